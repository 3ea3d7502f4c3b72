"""Work in several processes: what fails, what is killed, and that the rest goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from unicon_pipeline.errors import DatasetError, UniconError
from unicon_pipeline.workers import Failure, Workers, usable_processes


def each(function, items, processes, *shared):
    with Workers(processes) as workers:
        yield from workers.each(function, items, *shared)


def work(item, offset=0, folder=None):
    """Runs in worker processes, so it is found by its module's name."""
    if folder is not None:
        with open(folder / f"{item}.runs", "a") as file:
            file.write("x")
    if item == "killed sending":  # while the pipe is full of the first part of it
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return bytes(400 << 20)
    if item == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if item.startswith("slow"):
        time.sleep(120)
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


def test_a_process_killed_while_it_sends_is_noticed():
    script = (
        "import os, signal, sys, threading\nfrom test_workers import each, work\n"
        "print([(item, type(outcome).__name__) for item, outcome in each(work, ['killed sending', 'a'], 2)])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, timeout=60)
    assert b"('a', 'int')" in done.stdout and b"killed sending" in done.stdout


def test_a_killed_process_is_named_and_the_others_finish(tmp_path, caplog):
    items = ["kill", *(f"case{i:02d}" for i in range(8))]
    start = time.monotonic()
    done = list(each(work, items, 2, 0, tmp_path))
    assert time.monotonic() - start < 30
    assert sorted(item for item, _ in done) == sorted(items)
    found = dict(done)
    assert isinstance(found["kill"], Failure)
    assert "killed" in found["kill"]
    assert [found[item] for item in items[1:]] == [6] * 8
    assert len((tmp_path / "kill.runs").read_text()) == 2  # beside others, and once more alone
    assert [len((tmp_path / f"{item}.runs").read_text()) for item in items[1:]] == [1] * 8  # the innocent once
    assert [record.message.split()[5] for record in caplog.records] == ["kill"]


def test_two_killed_processes_are_both_named():
    found = list(each(work, ["kill", "a", "kill", "b"], 2))
    assert sorted((item, isinstance(outcome, Failure)) for item, outcome in found) == [
        ("a", False), ("b", False), ("kill", True), ("kill", True),
    ]  # fmt: skip


@pytest.fixture(params=["threads", "processes"])
def executor(request):
    pool = ThreadPoolExecutor(2) if request.param == "threads" else ProcessPoolExecutor(2, get_context("spawn"))
    with pool:
        yield pool


def test_an_executor_does_the_work(executor):
    with Workers(executor=executor) as workers:
        assert not workers.in_process
        found = dict(workers.each(work, ["a", "bad", "bbb", "big", "disk"], 10))
        assert (found["a"], found["bbb"]) == (11, 13)
        assert all(isinstance(found[name], Failure) for name in ("bad", "big", "disk"))
        assert list(workers.each(work, [])) == []
        with pytest.raises(ZeroDivisionError):
            list(workers.each(work, ["a", "bug", "b"]))
    assert executor.submit(len, "abc").result() == 3, "it is not ours to end"


class ByHand:
    """An executor whose jobs are done when the test says so."""

    def __init__(self):
        self.given = []

    def submit(self, function, *args):
        future = Future()
        self.given.append((future, args[1]))
        return future

    def finish(self, index, value):
        self.given[index][0].set_result(value)


def test_an_executor_gets_no_more_at_a_time_than_is_said_and_nothing_after_it_is_left():
    executor = ByHand()
    done = Workers(executor=executor).each(work, list("abcde"), at_most=2)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, done)
        while len(executor.given) < 2:
            time.sleep(0.001)
        executor.finish(1, "second")
        assert first.result() == ("b", "second"), "in the order of completion"
    assert [item for _, item in executor.given] == ["a", "b", "c"]
    executor.given[0][0].set_running_or_notify_cancel()
    done.close()
    assert [future.cancelled() for future, _ in executor.given] == [False, False, True]
    everything = Workers(executor=executor).each(work, list("fghij"))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, everything)
        while len(executor.given) < 8:
            time.sleep(0.001)
        executor.finish(3, "f")
        assert first.result() == ("f", "f")
    everything.close()


def test_an_executor_that_breaks_is_an_error_in_words():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with pytest.raises(UniconError, match="The ProcessPoolExecutor that works on the cases has ended.* run again"):
            list(Workers(executor=pool).each(work, ["a", "kill", "b"]))


SLOW = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits that it is ignored
from pathlib import Path
from test_workers import work
from unicon_pipeline.workers import Workers
with Workers(2) as workers:
    list(workers.each(work, ["slow1", "slow2", "slow3"], 0, Path(sys.argv[1])))
"""


def descendants(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_an_interrupted_run(tmp_path, number):
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here)])
    run = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path)], env={**os.environ, "PYTHONPATH": path},
                           stderr=subprocess.PIPE, text=True)  # fmt: skip
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("*.runs"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = descendants(run.pid)
    assert len(children) >= 2
    run.send_signal(number)
    try:
        run.wait(20)
    finally:
        run.kill()
        run.wait()
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [child for child in children if os.path.exists(f"/proc/{child}")] == []
    assert sorted(file.stem for file in tmp_path.glob("*.runs")) == ["slow1", "slow2"]
    run.stderr.close()


def test_where_the_work_is_done():
    (one,), two = each(work, ["pid"], 4), list(each(work, ["pid", "pid"], 2))
    assert one == ("pid", os.getpid())
    assert os.getpid() not in [pid for _, pid in two]
    assert list(each(work, [], 2)) == []


def test_a_script_without_a_main_guard(tmp_path):
    """Else each process runs the script again, waits for a folder that the first run holds, and all stand still."""
    script = tmp_path / "script.py"
    script.write_text("print('started')\nfrom test_workers import work\nfrom unicon_pipeline.workers import Workers\n"
                      "with Workers(2) as workers:\n    print(sorted(workers.each(work, ['a', 'bb'])))\n")  # fmt: skip
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here)])
    run = subprocess.run([sys.executable, script], env={**os.environ, "PYTHONPATH": path}, capture_output=True,
                         text=True, timeout=60)  # fmt: skip
    assert run.stdout.splitlines() == ["started", "[('a', 1), ('bb', 2)]"]
    assert run.stderr == ""


def test_processes_that_fit():
    assert usable_processes(1e12) == 1
    assert 1 <= usable_processes(0.001) <= os.cpu_count()
