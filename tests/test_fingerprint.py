"""What is measured of a task: over all voxels, bad files set aside, the same in any number of runs and processes."""

import json
import logging

import numpy as np
import pytest

from unicon_pipeline import measure
from unicon_pipeline.dataset import read_task
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.fingerprint import CaseFingerprint, Fingerprint, described, fingerprint_task
from unicon_pipeline.geometry import Grid, Volume, orient, write_image, write_labels
from unicon_pipeline.records import read_record, write_record
from unicon_pipeline.workers import Workers

LPS = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def write_case(folder, case_id, seed=0, code="LPS", pet=True, labelled=True):
    """A body of 12 x 20 x 16 voxels in air; tumour of 4 x 4 x 4 voxels at 100 to 163 HU, node of 2 x 2 x 2 at 60."""
    grid = Grid((24, 32, 28), (3.0, 1.0, 2.0), (0.0, 0.0, 0.0), LPS)
    ct = np.full(grid.shape_zyx, -1000, np.float32)
    ct[6:18, 6:26, 6:22] = np.random.default_rng(seed).integers(0, 600, (12, 20, 16))
    labels = np.zeros(grid.shape_zyx, np.int16)
    if labelled:
        labels[8:12, 8:12, 8:12], labels[14:16, 20:22, 14:16] = 1, 2
        ct[labels == 1], ct[labels == 2] = np.arange(100, 164), 60
    (folder / "imagesTr").mkdir(parents=True, exist_ok=True)
    ct, labels = (orient(Volume(array, grid), code) for array in (ct, labels))
    write_image(folder / "imagesTr" / f"{case_id}_0000.nii.gz", ct.array_zyx, ct.grid)
    write_labels(folder / "labelsTr" / f"{case_id}.nii.gz", labels.array_zyx, labels.grid)
    if pet:
        write_image(folder / "imagesTr" / f"{case_id}_0001.nii.gz", np.where(ct.array_zyx > -900, 2, 0), ct.grid)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "Task"
    for number, code in enumerate(["LPS", "RAS", "SLP"]):
        write_case(folder, f"case{number}", number, code, pet=number != 1)
    description = {
        "channel_names": {"0": "ct", "1": "PET"}, "file_ending": ".nii.gz", "regions_class_order": [1, 2],
        "labels": {"background": 0, "whole": [1, 2], "node": 2},
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def test_statistics_are_those_of_labelled_voxels(folder):
    found = fingerprint_task(read_task(folder), "LPS", Workers())
    values = np.tile([60.0] * 8 + list(range(100, 164)), 3)
    ct = found.intensity["CT"]
    assert (ct.n, ct.min, ct.max, ct.median) == (216, 60, 163, np.median(values))
    assert (ct.mean, ct.std) == pytest.approx((values.mean(), values.std()))
    assert (ct.percentile_00_5, ct.percentile_99_5) == pytest.approx(np.percentile(values, (0.5, 99.5)))
    assert (found.intensity["PET"].n, found.intensity["PET"].mean) == (144, 2)
    assert (found.spacing_spread_mm.low, found.shape_spread.median) == ((3.0, 1.0, 2.0), (24.0, 32.0, 28.0))
    assert found.label_frequencies["node"].share == pytest.approx(8 / 72)
    assert found.remarks == ()


def test_a_modality_that_no_case_has_has_no_statistics(folder):
    for path in folder.glob("imagesTr/*_0001*"):
        path.unlink()
    assert list(fingerprint_task(read_task(folder), "LPS", Workers()).intensity) == ["CT"]


def test_the_same_with_two_processes_and_from_what_was_kept(folder, tmp_path):
    task, kept = read_task(folder), tmp_path / "kept"
    with Workers(2) as workers:
        found = [
            fingerprint_task(task, "LPS", Workers()),
            fingerprint_task(task, "LPS", workers, kept),
            fingerprint_task(task, "LPS", workers, kept),
        ]
    for number, one in enumerate(found):
        write_record(tmp_path / f"{number}.json", one)
        assert read_record(tmp_path / f"{number}.json", Fingerprint) == one
    assert len({(tmp_path / f"{number}.json").read_bytes() for number in range(3)}) == 1
    assert sorted(path.name for path in kept.iterdir()) == [f"case{number}.safetensors" for number in range(3)]


def test_only_what_is_new_or_changed_is_measured(folder, tmp_path, monkeypatch):
    kept, names, read = tmp_path / "kept", [], measure._read
    monkeypatch.setattr(measure, "_read", lambda case: names.append(case.case_id) or read(case))
    fingerprint_task(read_task(folder), "LPS", Workers(), kept)
    (kept / ".77.partial.case0.safetensors").write_bytes(b"left by a killed process")
    write_case(folder, "case1", seed=5)
    write_case(folder, "case3", seed=3)
    (folder / "imagesTr" / "case2_0000.nii.gz").write_bytes(b"no image")
    names.clear()
    found = fingerprint_task(read_task(folder), "LPS", Workers(), kept)
    assert names == ["case1", "case2", "case3"]
    assert sorted(path.name for path in kept.iterdir()) == [f"case{number}.safetensors" for number in (0, 1, 3)]
    assert found == fingerprint_task(read_task(folder), "LPS", Workers())


def test_a_case_that_is_there_twice_is_told(folder):
    """Stored in another orientation, under another patient's name."""
    write_case(folder, "twin", 0, "SLP")
    write_case(folder, "other", 9)
    (found,) = fingerprint_task(read_task(folder), "LPS", Workers()).remarks
    assert "alike under different patients: case0 and twin (the same). One" in found


def test_unusable_cases_are_named_and_the_others_kept(folder):
    truncated = folder / "imagesTr" / "case1_0000.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:200])
    with Workers(2) as workers:
        found = fingerprint_task(read_task(folder), "LPS", workers)
    assert [case.case_id for case in found.cases] == ["case0", "case2"]
    assert list(found.failed) == ["case1"]
    assert str(truncated) in found.failed["case1"]
    for path in (folder / "imagesTr").glob("*_0000*"):
        path.write_bytes(b"no image")
    with pytest.raises(DatasetError, match="(?s)no usable case among 3.*case0: .*case2: "):
        fingerprint_task(read_task(folder), "LPS", Workers())


def test_one_line_per_case(folder, caplog):
    (folder / "imagesTr" / "case2_0000.nii.gz").write_bytes(b"no image")
    with caplog.at_level(logging.INFO):
        fingerprint_task(read_task(folder), "LPS", Workers())
    lines = [record.message for record in caplog.records if record.name.endswith("fingerprint")]
    labelled = "whole 0.43 ml in 2 parts, node 0.048 ml in 1 part"
    assert lines[0] == f"case0  ok  CT+PET  24 x 32 x 28  3 x 1 x 2 mm  {labelled}"
    assert lines[1] == f"case1  odd: no PET  CT  24 x 32 x 28  3 x 1 x 2 mm  {labelled}"
    assert lines[2].startswith("Task: case2 cannot be used: ") and "case2_0000.nii.gz" in lines[2]
    assert caplog.records[-1].levelname == "WARNING"


def test_a_line_stays_short():
    many = {f"organ{number:02d}": 10.0 * number for number in range(40)}
    case = CaseFingerprint("a", ("CT",), (9, 9, 9), (9, 9, 9), (3.27, 0.98, 0.98), {}, ("x", "y"), {}, None, 5, many)
    assert described(case) == (
        "a  odd: x; y  CT  9 x 9 x 9  3.27 x 0.98 x 0.98 mm  "
        "organ01 10.0 ml, organ02 20.0 ml, organ03 30.0 ml, organ04 40.0 ml, 35 more"
    )
