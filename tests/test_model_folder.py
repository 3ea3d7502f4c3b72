"""The model folder: nothing is rewritten, every change is found, a cut leaves the old model."""

import json
import shutil

import pytest
import torch

from unicon_pipeline import model_folder
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.model_folder import ModelFolder, open_or_create
from unicon_pipeline.model_record import EMBEDDED, foundation_spec
from unicon_pipeline.records import sha256_file


@pytest.fixture
def model(grown, tmp_path):
    shutil.copytree(grown.model, tmp_path / "model")
    return tmp_path / "model"


def test_chain_tells_what_each_extension_added(grown):
    folder = ModelFolder(grown.model)
    kinds = [(entry.kind, entry.name, entry.stems) for entry in folder.chain.entries]
    assert kinds == [("foundation", "residual_encoder", ()), ("task", "CT", ()), ("task", "CTPET", ("PET",))]
    named = {file for entry in folder.chain.entries for file in entry.files}
    there = {path.relative_to(grown.model).as_posix() for path in grown.model.rglob("*") if path.is_file()}
    assert there - named <= {"model.json", ".lock"}
    for entry in folder.chain.entries:
        assert entry.added_bytes == sum((grown.model / file).stat().st_size for file in entry.files)
    assert folder.chain.entries[2].trained_parameters > folder.chain.entries[1].trained_parameters > 1e6


def test_a_task_loads_with_the_weights_it_was_saved_with(grown):
    folder = ModelFolder(grown.model)
    foundation = folder.foundation()
    one, other = folder.task_model("CTPET", foundation), folder.task_model("CTPET", foundation)
    images, present = torch.randn(1, 2, 32, 32, 32), torch.tensor([[True, True]])
    assert torch.equal(one(images, present)[0], other(images, present)[0])
    assert not any(parameter.requires_grad for parameter in one.parameters())
    assert not any(module.training for module in one.modules())


def test_unknown_task_lists_what_there_is(grown):
    with pytest.raises(CheckpointError, match="no task 'Liver'; it has: CT, CTPET"):
        ModelFolder(grown.model).task_plan("Liver")


def test_no_model_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model folder: it has no model\.json"):
        ModelFolder(tmp_path)


def test_a_task_or_a_stem_is_added_once(grown, model):
    folder = ModelFolder(model)
    plan, network = folder.task_plan("CTPET"), folder.task_model("CTPET", folder.foundation())
    with pytest.raises(CheckpointError, match="already has the task CTPET"):
        folder.add_task(plan, network, {})


@pytest.mark.parametrize(
    "file",
    ["foundation/weights.safetensors", "tasks/CT/plan.json", "tasks/CTPET/weights.safetensors", "stems/PET/stem.json"],
)
def test_a_changed_file_is_refused_when_it_is_needed(model, file):
    data = bytearray((model / file).read_bytes())
    data[len(data) // 2] ^= 1
    (model / file).write_bytes(data)
    folder = ModelFolder(model)
    with pytest.raises(CheckpointError, match="has changed since it was added"):
        folder.stem_plans(), folder.task_plan("CT"), folder.task_model("CTPET", folder.foundation())


def test_a_missing_file_is_named(model):
    (model / "tasks/CT/weights.safetensors").unlink()
    folder = ModelFolder(model)
    with pytest.raises(CheckpointError, match=r"CT/weights\.safetensors is missing"):
        folder.task_model("CT", folder.foundation())


@pytest.mark.parametrize(
    "change",
    [
        lambda chain: chain["entries"].pop(1),
        lambda chain: chain["entries"].reverse(),
        lambda chain: chain["entries"][1].update(name="Other"),
        lambda chain: chain["entries"][-1].update(trained_parameters=1),
        lambda chain: chain["entries"][1]["files"].update({"tasks/CT/plan.json": "0" * 64}),
    ],
)
def test_a_changed_chain_is_refused(model, change):
    chain = json.loads((model / "model.json").read_text())
    change(chain)
    (model / "model.json").write_text(json.dumps(chain))
    with pytest.raises(CheckpointError, match="chain is broken"):
        ModelFolder(model)


@pytest.mark.parametrize("name", ["../../etc/passwd", "tasks//x", "tasks/../x", "/abs"])
def test_paths_out_of_the_folder_are_refused(model, name):
    chain = json.loads((model / "model.json").read_text())
    chain["entries"][-1]["files"] = {name: "0" * 64}
    (model / "model.json").write_text(json.dumps(chain))
    with pytest.raises(CheckpointError, match="name that no model folder has"):
        ModelFolder(model)


def test_a_cut_while_adding_leaves_the_old_model(grown, model, monkeypatch):
    """Whatever file the cut comes at, the chain is as it was, and the task can be added afterwards."""
    folder = ModelFolder(model)
    plan = folder.task_plan("CTPET")
    network = folder.task_model("CTPET", folder.foundation())
    card = folder.card("CTPET")
    chain = json.loads((model / "model.json").read_text())
    entries = [*chain["entries"][:2]]
    (model / "model.json").write_text(
        json.dumps({**chain, "entries": entries, "head": chain["entries"][2]["previous"]})
    )
    before = (model / "model.json").read_bytes()
    network.stems["PET"].requires_grad_(True)
    network.frozen_stems = ()
    writers = [("save_weights", 1), ("save_weights", 2), ("write_json", 1), ("write_record", 3)]
    for writer, call in writers:
        calls = []
        real = getattr(model_folder, writer)

        def cut(*arguments, real=real, calls=calls, call=call):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(model_folder, writer, cut)
            with pytest.raises(KeyboardInterrupt):
                ModelFolder(model).add_task(plan, network, card)
        assert (model / "model.json").read_bytes() == before
        assert ModelFolder(model).tasks == ("CT",)
    ModelFolder(model).add_task(plan, network, card)
    assert ModelFolder(model).tasks == ("CT", "CTPET")
    assert ModelFolder(model).head == ModelFolder(grown.model).head, "the same task gives the same bytes"


def test_a_new_model_starts_from_the_embedded_foundation(tmp_path):
    spec = foundation_spec(tmp_path / "model")
    folder = open_or_create(tmp_path / "model")
    assert folder.spec() == spec == ModelFolder(EMBEDDED).spec()
    weights = "foundation/weights.safetensors"
    assert sha256_file(tmp_path / "model" / weights) == sha256_file(EMBEDDED / weights)
    assert (EMBEDDED / weights).stat().st_size < 4_000_000
    assert open_or_create(tmp_path / "model").head == folder.head
