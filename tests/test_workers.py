"""Work in several processes: what fails, what is killed, and that the rest goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest

from unicon_pipeline.errors import DatasetError
from unicon_pipeline.workers import Failure, each, usable_processes


def work(item, offset=0, folder=None):
    """Runs in worker processes, so it is found by its module's name."""
    if folder is not None:
        with open(folder / f"{item}.runs", "a") as file:
            file.write("x")
    if item == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "bad":
        raise DatasetError("bad.nii.gz is truncated")
    if item == "big":
        raise MemoryError
    if item == "disk":
        raise OSError(28, "No space left on device")
    if item == "bug":
        raise ZeroDivisionError("a bug")
    return os.getpid() if item == "pid" else len(item) + offset


@pytest.mark.parametrize("processes", [1, 2])
def test_one_bad_item_does_not_stop_the_others(processes):
    found = dict(each(work, ["a", "bad", "bbb", "big", "disk"], processes, 10))
    assert (found["a"], found["bbb"]) == (11, 13)
    assert all(isinstance(found[name], Failure) for name in ("bad", "big", "disk"))
    assert found["bad"] == "bad.nii.gz is truncated"
    assert "not enough memory" in found["big"]
    assert "No space left" in found["disk"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bug_is_raised(processes):
    with pytest.raises(ZeroDivisionError):
        list(each(work, ["a", "bug", "b"], processes))


def test_a_killed_process_is_named_and_the_others_finish(tmp_path):
    items = ["kill", *(f"case{i:02d}" for i in range(8))]
    start = time.monotonic()
    done = list(each(work, items, 2, 0, tmp_path))
    assert time.monotonic() - start < 30
    assert sorted(item for item, _ in done) == sorted(items)
    found = dict(done)
    assert isinstance(found["kill"], Failure)
    assert "killed" in found["kill"]
    assert [found[item] for item in items[1:]] == [6] * 8
    assert len((tmp_path / "kill.runs").read_text()) == 2  # in the pool, and once more alone


def test_two_killed_processes_are_both_named():
    found = list(each(work, ["kill", "a", "kill", "b"], 2))
    assert sorted((item, isinstance(outcome, Failure)) for item, outcome in found) == [
        ("a", False), ("b", False), ("kill", True), ("kill", True),
    ]  # fmt: skip


def test_where_the_work_is_done():
    (one,), two = each(work, ["pid"], 4), list(each(work, ["pid", "pid"], 2))
    assert one == ("pid", os.getpid())
    assert os.getpid() not in [pid for _, pid in two]
    assert list(each(work, [], 2)) == []


def test_a_script_without_a_main_guard(tmp_path):
    """Else each process runs the script again, waits for a folder that the first run holds, and all stand still."""
    script = tmp_path / "script.py"
    script.write_text("print('started')\nfrom test_workers import work\nfrom unicon_pipeline.workers import each\n"
                      "print(sorted(each(work, ['a', 'bb'], 2)))\n")  # fmt: skip
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here)])
    run = subprocess.run([sys.executable, script], env={**os.environ, "PYTHONPATH": path}, capture_output=True,
                         text=True, timeout=60)  # fmt: skip
    assert run.stdout.splitlines() == ["started", "[('a', 1), ('bb', 2)]"]
    assert run.stderr == ""


def test_processes_that_fit():
    assert usable_processes(1e12) == 1
    assert 1 <= usable_processes(0.001) <= os.cpu_count()
