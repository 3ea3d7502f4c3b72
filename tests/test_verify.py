"""unicon_verify: intact models pass, one flipped byte anywhere is found and named."""

import shutil

import pytest

from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.model_folder import ModelFolder
from unicon_pipeline.verify import compare_probes, probe, verify


def test_an_intact_model_passes_file_by_file_and_task_by_task(grown):
    report = verify(grown.model)
    assert report.ok and not report.problems
    assert {"CT: probe output is identical", "CTPET: probe output is identical"} <= set(report.checked)
    assert sum("unchanged" in line for line in report.checked) == 10


def test_one_flipped_byte_in_any_file_is_found_and_named(grown, tmp_path):
    files = [path for path in sorted(grown.model.rglob("*")) if path.is_file() and path.name != ".lock"]
    assert len(files) == 11
    for path in files:
        shutil.copytree(grown.model, tmp_path / "model")
        target = tmp_path / "model" / path.relative_to(grown.model)
        data = bytearray(target.read_bytes())
        data[len(data) // 3] ^= 0b100
        target.write_bytes(data)
        report = verify(tmp_path / "model")
        assert not report.ok
        assert any(str(target) in problem for problem in report.problems), (target, report.problems)
        shutil.rmtree(tmp_path / "model")


def test_other_formatting_of_the_chain_is_a_change(grown, tmp_path):
    shutil.copytree(grown.model, tmp_path / "model")
    chain = tmp_path / "model" / "model.json"
    chain.write_text(chain.read_text() + "\n")
    report = verify(tmp_path / "model")
    assert not report.ok and "not as it was written" in report.problems[0]


def test_no_model_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no model folder"):
        verify(tmp_path)


def test_probe_sees_a_change_of_any_trained_part(grown):
    folder = ModelFolder(grown.model)
    plan = folder.task_plan("CTPET").data
    stored = folder.card("CTPET")["probe"]
    for part in ("adapter", "head"):
        model = folder.task_model("CTPET", folder.foundation())
        assert compare_probes(stored, probe(model, plan)) == "identical"
        next(getattr(model, part).parameters()).mul_(1.01)
        next(reversed(list(getattr(model, part).parameters()))).add_(0.01)
        assert compare_probes(stored, probe(model, plan)).startswith("different")


def test_another_machine_may_differ_in_the_last_bits_only():
    stored = {"sha256": "a", "samples": [1.0, -10.0], "machine": {"torch": "2.14"}}
    elsewhere = {"torch": "2.15"}
    for first, verdict in ((1.001, "close"), (1.1, "different")):
        now = {"sha256": "b", "samples": [first, -10.0], "machine": elsewhere}
        assert compare_probes(stored, now).startswith(verdict)
    same = {"sha256": "b", "samples": [1.0, -10.0], "machine": stored["machine"]}
    assert compare_probes(stored, same).startswith("different on the machine that stored it")
