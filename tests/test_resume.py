"""The whole command, killed at any moment and run again; and one of its processes killed while it works."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from benchmarks.kill_resume import compare, contents, kill_at, moments, run, start, write_task

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in Linux's /proc")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The task, what a run of it leaves, and how long it takes."""
    root = tmp_path_factory.mktemp("resume")
    task = write_task(root / "Lesions", 5, (32, 64, 64))
    seconds = run(task, root / "work")
    return task, contents(root / "work"), seconds


def test_an_undisturbed_run_leaves_what_it_should(undisturbed):
    _, files, _ = undisturbed
    names = [Path(file).name for file in files]
    assert {"plan.json", "fingerprint.json"} <= set(names)
    assert sum("phantom_000" in file and "cases" in file for file in files) >= 5
    assert not [name for name in names if "partial" in name]


@pytest.mark.skipif(os.name != "posix", reason="kills a process group")
@pytest.mark.parametrize("index", range(3))
def test_killed_at_any_moment_and_run_again_the_result_is_that_of_an_undisturbed_run(undisturbed, index, tmp_path):
    task, expected, seconds = undisturbed
    kill_at(moments(3, seconds, seed=4)[index], task, tmp_path)
    run(task, tmp_path)
    assert compare(expected, contents(tmp_path)) == []


def test_the_comparison_sees_what_differs():
    assert compare({"a": "1", "b": "2"}, {"b": "3", "c": "4"}) == ["a is missing", "c is left over", "b differs"]
    assert compare({"a": "1"}, {"a": "1"}) == []


def worker_processes(pid):
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        command = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"spawn_main" in command:
            found.append(int(child))
    return found


@linux_only
def test_a_killed_process_is_named_at_once_and_nothing_is_lost(undisturbed, tmp_path):
    task, expected, _ = undisturbed
    process = start(task, tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    heard, lines = threading.Event(), []

    def listen():
        for line in process.stderr:
            lines.append(line)
            if "was killed" in line:
                heard.set()

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        while len(workers := worker_processes(process.pid)) < 2:
            assert process.poll() is None
            time.sleep(0.005)
        os.kill(workers[0], signal.SIGKILL)
        assert heard.wait(5)
        assert process.wait(30) == 0
    finally:
        process.kill()
        listener.join()
        process.stderr.close()
    (message,) = [line for line in lines if "was killed" in line]
    assert "phantom_000" in message
    assert compare(expected, contents(tmp_path)) == []
