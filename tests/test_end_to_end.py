"""The console commands as a user calls them: a fresh folder with a space in its name, and a few mistakes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import SimpleITK as sitk

from unicon_pipeline.phantoms import write_phantom_task

SMALL = {"shape_zyx": (32, 48, 48), "spacing_zyx_mm": (10.0, 8.0, 8.0)}


def run(command, *arguments, cwd, status=0):
    """Runs a console script of this environment with an empty one of its own; its stdout."""
    script = Path(sys.executable).with_name(command)
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd)}
    done = subprocess.run(
        [str(script), *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if status == 0 else done.stdout + done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("a user")
    for task, modalities in (("Lesion_CT", ("CT",)), ("Lesion_CTPET", ("CT", "PET"))):
        write_phantom_task(home / "unicon_work" / "raw" / task, "lesions", 3, 9, modalities=modalities, **SMALL)
    return home


def test_the_way_of_the_readme(home):
    table = run("unicon_plan_and_preprocess", "-t", "Lesion_CT", "Lesion_CTPET", cwd=home)
    assert "a fixed scale for all images" in table and "patch" in table
    assert "rank 8" in run("unicon_extend", "-t", "Lesion_CT", "--dry-run", cwd=home)
    assert not (home / "unicon_work" / "model").exists(), "a dry run writes nothing"
    for task in ("Lesion_CT", "Lesion_CTPET"):
        assert f"Added {task}" in run("unicon_extend", "-t", task, "--minutes", "0.02", cwd=home)
    images = home / "unicon_work" / "raw" / "Lesion_CTPET" / "imagesTr"
    assert "6 results from 3 cases" in run("unicon_predict", "-i", images, "-o", "OUT", cwd=home)
    assert "lesion" in run("unicon_evaluate", "-t", "Lesion_CTPET", "-p", "OUT/Lesion_CTPET", cwd=home)
    scores = json.loads(run("unicon_evaluate", "-t", "Lesion_CT", "-p", "OUT/Lesion_CT", "--json", cwd=home))
    assert scores["overall"]["dice"]["n"] == 3
    assert ": intact" in run("unicon_verify", cwd=home)
    info = run("unicon_info", cwd=home)
    assert "Lesion_CTPET: segmentation of lesion from CT and/or PET, brought the stem for PET" in info


def test_mistakes_get_one_clear_sentence(home):
    assert "Tasks in unicon_work/raw: Lesion_CT" in run("unicon_extend", "-t", "Leison_CT", cwd=home, status=2)
    (home / "empty").mkdir()
    assert "expected files such as" in run("unicon_predict", "-i", "empty", "-o", "OUT2", cwd=home, status=2)
    assert "no model folder" in run("unicon_verify", "-m", "nowhere", cwd=home, status=2)


def test_one_truncated_image_costs_its_case_only(home):
    images = home / "unicon_work" / "raw" / "Lesion_CTPET" / "imagesTr"
    inputs = home / "three cases"
    inputs.mkdir()
    for case, channels in (("broken", (0, 1)), ("ctonly", (0,)), ("full", (0, 1))):
        for channel in channels:
            shutil.copy(images / f"phantom_0001_{channel:04d}.nii.gz", inputs / f"{case}_{channel:04d}.nii.gz")
    broken = inputs / "broken_0001.nii.gz"
    broken.write_bytes(broken.read_bytes()[:2000])
    output = run("unicon_predict", "-i", "three cases", "-o", "OUT3", cwd=home, status=1)
    assert "broken_0001.nii.gz" in output
    for case in ("ctonly", "full"):
        mask = sitk.ReadImage(str(home / "OUT3" / "Lesion_CTPET" / f"{case}.nii.gz"))
        assert mask.GetSize() == sitk.ReadImage(str(inputs / f"{case}_0000.nii.gz")).GetSize()
    assert not (home / "OUT3" / "Lesion_CTPET" / "broken.nii.gz").exists()
    cases = {case["case_id"]: case for case in json.loads((home / "OUT3" / "run.json").read_text())["cases"]}
    assert cases["broken"]["failure"] and not cases["full"]["failure"]


def test_one_flipped_byte_is_found_and_named(home):
    shutil.copytree(home / "unicon_work" / "model", home / "other")
    weights = home / "other" / "tasks" / "Lesion_CT" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    output = run("unicon_verify", "-m", "other", cwd=home, status=1)
    assert "tasks/Lesion_CT/weights.safetensors has changed" in output
