"""Preprocessing runs: what is stored, what is kept, what is made again, and runs that go on."""

import dataclasses
import itertools

import numpy as np
import pytest

from unicon_pipeline import measure, preprocess
from unicon_pipeline.budget import PRESETS
from unicon_pipeline.dataset import read_case, read_task
from unicon_pipeline.families.dna_encoders import new_residual_encoder_spec
from unicon_pipeline.fingerprint import Fingerprint
from unicon_pipeline.geometry import write_image
from unicon_pipeline.input_shape import Overrides
from unicon_pipeline.phantoms import make_phantom, write_phantom_task
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.prepare import prepare_case
from unicon_pipeline.preprocess import plan_and_preprocess
from unicon_pipeline.records import read_record
from unicon_pipeline.store import open_case, read_meta, stored_case_ids, write_case
from unicon_pipeline.workers import Workers

SMALL = {"shape_zyx": (20, 32, 32), "spacing_zyx_mm": (10.0, 9.0, 9.0)}


@pytest.fixture(scope="module")
def foundation():
    return new_residual_encoder_spec("Apache-2.0", {"made_by": "the tests"})


@pytest.fixture
def raw(tmp_path):
    return write_phantom_task(tmp_path / "raw" / "Task", "lesions", 3, 5, modalities=("CT", "PET"), **SMALL)


@pytest.fixture
def run(raw, tmp_path, foundation):
    def again(spacing=None, processes=1):
        return plan_and_preprocess(
            raw, tmp_path / "work", foundation, PRESETS["cpu"], overrides=Overrides(spacing), processes=processes
        )

    return again


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
            for path in sorted(folder.rglob("*")) if path.is_file()}  # fmt: skip


def changed(before, after):
    assert before.keys() == after.keys()
    return sorted({name.split("/")[1] for name in before if name.startswith("cases/") and before[name] != after[name]})


class TestRuns:
    def test_what_is_stored(self, run, raw, tmp_path):
        made, failed = run()
        cases = tmp_path / "work" / "preprocessed" / "Task" / "cases"
        assert not failed
        assert stored_case_ids(cases) == ("phantom_0001", "phantom_0002", "phantom_0003")
        task = read_task(raw)
        for case in task.cases:
            images = read_case(case)
            labels = preprocess.check_labels(case, images["CT"].grid, task.labels)
            expected, stored = prepare_case(images, made, labels), open_case(cases, case.case_id)
            assert np.array_equal(stored.array[:], expected.array_czyx)
            assert np.array_equal(stored.labels[:], expected.labels_zyx)
            assert stored.present == ("CT", "PET")
            voxels = np.array(stored.foreground["lesion"])
            assert 0 < len(voxels) <= 2000
            assert (stored.labels[:][tuple(voxels.T)] == 1).all()

    def test_a_second_run_changes_nothing_and_reads_no_image(self, run, tmp_path, monkeypatch):
        folder = tmp_path / "work" / "preprocessed" / "Task"
        first, _ = run()
        before = snapshot(folder)
        monkeypatch.setattr(preprocess, "read_case", None)
        monkeypatch.setattr(measure, "_read", None)
        assert run() == (first, {})
        after = snapshot(folder)
        assert changed(before, after) == []
        assert {name: data for name, (_, data) in before.items()} == {name: data for name, (_, data) in after.items()}

    def test_a_damaged_file_and_a_changed_input_cost_their_cases_only(self, run, raw, tmp_path):
        folder = tmp_path / "work" / "preprocessed" / "Task"
        run()
        before = snapshot(folder)
        damaged = folder / "cases" / "phantom_0002" / "image.b2nd"
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 255
        damaged.write_bytes(bytes(data))
        run()
        after = snapshot(folder)
        assert changed(before, after) == ["phantom_0002"]
        assert after["cases/phantom_0002/image.b2nd"][1] == before["cases/phantom_0002/image.b2nd"][1]
        (folder / "cases" / "phantom_0003" / "meta.json").write_text("{")
        run()
        assert changed(after, snapshot(folder)) == ["phantom_0003"]
        after = snapshot(folder)
        other = make_phantom(77, **SMALL)
        write_image(raw / "imagesTr" / "phantom_0001_0001.nii.gz", other.pet.array_zyx, other.pet.grid)
        run()
        assert changed(after, snapshot(folder)) == ["phantom_0001"]

    def test_another_plan_makes_all_cases_anew(self, run, tmp_path):
        folder = tmp_path / "work" / "preprocessed" / "Task"
        run()
        before = snapshot(folder)
        run((12.0, 12.0, 12.0))
        assert changed(before, snapshot(folder)) == ["phantom_0001", "phantom_0002", "phantom_0003"]
        assert read_meta(folder / "cases", "phantom_0001")["geometry"]["original"]["spacing_zyx_mm"][0] == 10.0

    def test_a_case_that_is_gone_is_forgotten(self, run, raw, tmp_path):
        run()
        for path in itertools.chain(raw.glob("imagesTr/phantom_0001*"), raw.glob("labelsTr/phantom_0001*")):
            path.unlink()
        run()
        cases = tmp_path / "work" / "preprocessed" / "Task" / "cases"
        assert stored_case_ids(cases) == ("phantom_0002", "phantom_0003")

    def test_a_truncated_file_is_reported_and_the_others_finish(self, run, raw, tmp_path):
        path = raw / "imagesTr" / "phantom_0002_0001.nii.gz"
        whole = path.read_bytes()
        run()
        path.write_bytes(whole[: len(whole) // 2])
        made, failed = run()
        assert list(failed) == ["phantom_0002"]
        assert str(path) in failed["phantom_0002"]
        cases = tmp_path / "work" / "preprocessed" / "Task" / "cases"
        assert stored_case_ids(cases) == ("phantom_0001", "phantom_0003")  # no stale copy of the broken one
        assert "phantom_0002" not in {name for fold in made.folds for name in fold}
        path.write_bytes(whole)
        assert run()[1] == {}
        assert len(stored_case_ids(cases)) == 3

    def test_a_case_that_breaks_after_planning_leaves_no_stale_copy(self, run, raw, tmp_path):
        run()
        cases = tmp_path / "work" / "preprocessed" / "Task" / "cases"
        fingerprint = read_record(cases.parent / "fingerprint.json", Fingerprint)
        plan = dataclasses.replace(read_record(cases.parent / "plan.json", DataPlan), spacing_zyx_mm=(9.0, 9.0, 9.0))
        (raw / "labelsTr" / "phantom_0001.nii.gz").write_bytes(b"no labels")
        failed = preprocess.preprocess_task(read_task(raw), fingerprint, plan, cases, Workers())
        assert list(failed) == ["phantom_0001"]
        assert stored_case_ids(cases) == ("phantom_0002", "phantom_0003")

    def test_an_interrupted_run_leaves_no_half_file_and_goes_on(self, run, tmp_path, monkeypatch):
        cases = tmp_path / "work" / "preprocessed" / "Task" / "cases"

        done = []

        def second_interrupted(folder, case_id, *rest):
            if done:
                (folder / case_id).mkdir()
                (folder / case_id / ".1.partial.labels.b2nd").write_bytes(b"half")  # as a killed process leaves it
                raise KeyboardInterrupt
            done.append(case_id)
            write_case(folder, case_id, *rest)

        monkeypatch.setattr(preprocess, "write_case", second_interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
        assert [path.name for path in cases.iterdir()] == done
        before = snapshot(cases.parent)
        monkeypatch.undo()
        assert run()[1] == {}
        after = snapshot(cases.parent)
        assert len(stored_case_ids(cases)) == 3
        first = [name for name in before if done[0] in name]
        assert first and all(before[name] == after[name] for name in first)

    def test_large_cases_get_fewer_processes(self, run, monkeypatch):
        asked = []

        def ask(megabytes_each):
            asked.append(megabytes_each)
            return 1

        monkeypatch.setattr(preprocess, "usable_processes", ask)
        run(processes=None)
        run((2.0, 2.0, 2.0), processes=None)
        assert 250 < asked[1] < 251 and asked[3] - 250 > 50 * (asked[1] - 250)  # of arrays a hundred times as large
