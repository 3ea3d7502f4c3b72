"""Work on a Dask cluster: a real scheduler and two workers on this machine, started here."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("distributed")

from test_workers import work

import unicon_pipeline.dask_cluster as dask_cluster
from unicon_pipeline.cli import main_plan_and_preprocess
from unicon_pipeline.dask_cluster import dask_workers, open_workers
from unicon_pipeline.errors import DatasetError, UniconError
from unicon_pipeline.predict import predict_folder
from unicon_pipeline.workers import Failure, Workers

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1",
    # As many as here, so that predictions are equal to the last bit.
    "OMP_NUM_THREADS": str(torch.get_num_threads()),
    "MKL_NUM_THREADS": str(torch.get_num_threads()),
}


def start(folder: Path, name: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "dask", name.split("_")[0], *arguments, "--host", "127.0.0.1", "--no-dashboard"]
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.Popen(command, env=ENVIRONMENT, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def wait_until(true, seconds=30):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


NOBODY = """
import sys, time
from unicon_pipeline.dask_cluster import open_workers
from unicon_pipeline.errors import UniconError
started = time.monotonic()
try:
    with open_workers(1, sys.argv[1]):
        pass
except UniconError as problem:
    sys.stdout.write(f"{problem}\\n{time.monotonic() - started}")
"""


@pytest.fixture(scope="module", autouse=True)
def nobody():
    """Someone who waits for a scheduler where none is, while the other tests run, and that address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", NOBODY, address]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as waiting:
        yield waiting, address
        waiting.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a scheduler that has two workers of one thread each, which run in a folder of their own."""
    folder = tmp_path_factory.mktemp("dask")
    file, running = folder / "scheduler.json", []
    try:
        running.append(start(folder, "scheduler", "--port", "0", "--scheduler-file", str(file)))
        for number in (1, 2):
            options = ("--scheduler-file", str(file), "--nthreads", "1", "--death-timeout", "60")
            running.append(start(folder, f"worker_{number}", *options, "--local-directory", str(folder)))
        wait_until(file.exists)
        logs = [folder / f"worker_{number}.log" for number in (1, 2)]
        wait_until(lambda: all("Registered to" in log.read_text() for log in logs))
        yield json.loads(file.read_text())["address"]
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def workers(cluster):
    with dask_workers(cluster) as workers:
        yield workers


def test_each_item_is_done_on_the_cluster_and_one_bad_one_does_not_stop_the_others(workers):
    assert not workers.in_process
    found = dict(workers.each(work, ["a", "bad", "bbb", "big", "disk", "pid"], 10))
    assert (found["a"], found["bbb"]) == (11, 13)
    assert found["pid"] != os.getpid()
    assert all(isinstance(found[name], Failure) for name in ("bad", "big", "disk"))
    assert found["bad"] == "bad.nii.gz is truncated"
    assert list(workers.each(work, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(workers.each(work, ["a", "bug", "b"]))


@dataclasses.dataclass(frozen=True)
class Scan:
    case_id: str
    images: dict[str, Path]


def note(scan, folder, seconds=0.0):
    """Runs on a worker: notes its process; dies on the way in the first run of a case named `dies_...`."""
    if not folder.is_absolute() or not all(path.is_absolute() for path in scan.images.values()):
        raise DatasetError("a relative path")
    with open(folder / scan.case_id, "a") as file:
        file.write(f"{os.getpid()}\n")
    runs = (folder / scan.case_id).read_text().split()
    if scan.case_id.startswith("kills") or (scan.case_id.startswith("dies") and len(runs) == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(seconds)
    return scan.case_id


def scans(folder, *names):
    (folder / "image").touch()
    return [Scan(name, {"CT": folder / "image"}) for name in names]


def test_a_killed_worker_costs_a_retry_of_its_case_and_names_it(workers, tmp_path, caplog):
    items = scans(tmp_path, "one", "dies_once", "two", "three", "four")
    found = dict((scan.case_id, outcome) for scan, outcome in workers.each(note, items, tmp_path, at_most=2))
    assert found == {scan.case_id: scan.case_id for scan in items}
    assert len((tmp_path / "dies_once").read_text().split()) == 2
    lost = [record.getMessage() for record in caplog.records if "is lost; another one takes it" in record.getMessage()]
    assert any("which had dies_once" in message for message in lost)


def test_what_kills_every_worker_is_a_failure_and_the_rest_is_done(workers, tmp_path):
    items = scans(tmp_path, "kills", "one", "two", "three")
    found = dict((scan.case_id, outcome) for scan, outcome in workers.each(note, items, tmp_path, at_most=2))
    assert isinstance(found["kills"], Failure) and "its process was killed" in found["kills"]
    assert [found[name] for name in ("one", "two", "three")] == ["one", "two", "three"]


def test_leaving_early_cancels_what_waits_and_no_more_than_is_said_run_at_once(workers, tmp_path):
    items = scans(tmp_path, *(f"case{number}" for number in range(6)))
    done = workers.each(note, items, tmp_path, 0.3, at_most=1)
    next(done)
    time.sleep(0.1)
    assert len(list(tmp_path.glob("case*"))) <= 2
    done.close()
    time.sleep(1)
    assert len(list(tmp_path.glob("case*"))) <= 2


def test_predictions_are_the_same_files_as_of_one_process(workers, grown, tmp_path):
    images = grown.raw("CTPET") / "imagesTr"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken_0000.nii.gz").write_bytes(b"no image")
    for number in (1, 2):
        for path in images.glob(f"phantom_000{number}_*"):
            shutil.copy(path, tmp_path / "in" / path.name)
    kinds = {"device": "cpu", "precision": "fp32", "save_probabilities": True}
    here = predict_folder(tmp_path / "in", tmp_path / "here", grown.model, **kinds)
    there = predict_folder(tmp_path / "in", tmp_path / "there", grown.model, workers=workers, **kinds)
    assert here.exit_code == there.exit_code == 1
    assert [(case.case_id, len(case.done)) for case in there.cases] == [("broken", 0), ("phantom_0001", 2),
                                                                        ("phantom_0002", 2)]  # fmt: skip
    assert there.precision == "float32" and there.machine["threads"] == here.machine["threads"]
    files = [path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*.nii.gz")]
    assert len(files) == 12
    for file in files:
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes(), file


def test_planning_on_the_cluster_gives_the_same_files(cluster, grown, tmp_path, capsys):
    for name, how in (("here", ("--processes", "1")), ("there", ("--dask", cluster))):
        task = str(grown.raw("CTPET"))
        assert main_plan_and_preprocess(["-t", task, "-w", str(tmp_path / name), "--device", "cpu", *how]) == 0
    here, there = (tmp_path / name / "preprocessed" for name in ("here", "there"))
    files = [path.relative_to(here) for path in here.rglob("*") if path.is_file()]
    assert len([file for file in files if file.name == "image.b2nd"]) == 3
    for file in files:
        assert (here / file).read_bytes() == (there / file).read_bytes(), file


def test_relative_paths_mean_the_same_on_the_workers(workers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (scan,) = scans(Path(""), "relative")
    ((item, outcome),) = workers.each(note, [scan], Path("."))
    assert item is scan
    assert outcome == "relative"
    assert (tmp_path / "relative").exists()


def test_a_path_that_a_worker_does_not_see_is_named(workers, tmp_path):
    scan = Scan("case", {"CT": Path(f"/proc/{os.getpid()}/fd/0")})
    job = dask_cluster._on_worker
    assert job(note, scan, (tmp_path,), [tmp_path], dask_cluster.__version__) == "case"
    outcome = job(note, scan, (tmp_path,), [tmp_path, Path("/only/here")], dask_cluster.__version__)
    assert isinstance(outcome, Failure) and "/only/here: not there for the Dask worker" in outcome
    needed = dask_cluster._needed(scan, (tmp_path / "new" / "folder", "text"))
    assert needed == sorted([tmp_path, *scan.images.values()])


def test_another_version_on_a_worker_is_refused(cluster, monkeypatch, tmp_path):
    monkeypatch.setattr(dask_cluster, "__version__", "99.0.0")
    with pytest.raises(UniconError, match="Dask worker tcp://.* has unicon-pipeline .*, here is 99.0.0: install"):
        with dask_workers(cluster):
            pass
    late = dask_cluster._on_worker(note, None, (), [], "1.2.3")
    assert isinstance(late, Failure) and "1.2.3" in late


@pytest.mark.parametrize("address", ["http://127.0.0.1:8786", "127.0.0.1:8786", "tcp://127.0.0.1", "tcp://a:b", ""])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UniconError, match="expected a Dask scheduler's address, such as tcp://"):
        with dask_workers(address):
            pass


def test_a_scheduler_that_goes_away_is_an_error_and_no_noise(tmp_path, caplog):
    file = tmp_path / "scheduler.json"
    scheduler = start(tmp_path, "scheduler", "--port", "0", "--scheduler-file", str(file))
    try:
        wait_until(file.exists)
        address = json.loads(file.read_text())["address"]
        with (
            pytest.raises(UniconError, match=f"The Dask scheduler at {address} was lost"),
            dask_workers(address) as none,
        ):
            done = none.each(work, ["never"], at_most=1)
            os.killpg(scheduler.pid, signal.SIGKILL)
            next(done)
        assert [record.name for record in caplog.records] == ["unicon_pipeline.dask_cluster"]
        assert "has no workers yet" in caplog.text
    finally:
        scheduler.kill()
        scheduler.wait()


def test_a_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UniconError, match="pip install distributed"):
        with dask_workers("tcp://127.0.0.1:1"):
            pass


def test_open_workers_is_one_or_the_other(cluster):
    with open_workers(3) as local:
        assert type(local) is Workers and local.processes == 3
    level = logging.getLogger("distributed").level
    with open_workers(1, cluster) as remote:
        assert not remote.in_process
    assert logging.getLogger("distributed").level == level


def test_no_scheduler_is_one_clear_error_within_ten_seconds_and_no_noise(nobody):
    waiting, address = nobody
    message, noise = waiting.communicate(timeout=30)
    said, seconds = message.rsplit("\n", 1)
    assert said.startswith(f"No Dask scheduler answers at {address}.")
    assert float(seconds) < 15  # eight, and what a busy machine adds
    assert noise == ""
