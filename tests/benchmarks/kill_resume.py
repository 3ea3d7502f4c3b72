"""Planning and preprocessing, killed at random moments and run again: is the result that of an undisturbed run?

    python tests/benchmarks/kill_resume.py [--moments 20] [--cases 12] [--seed 0]

Each time the whole process group gets SIGKILL, in a new work folder, at a moment drawn evenly from the last three
quarters of the time that the faster of two undisturbed runs took; before, Python only imports. Then the same command
is run to its end, and every file is compared byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from unicon_pipeline.phantoms import write_phantom_task

COMMAND = "import sys; from unicon_pipeline.cli import main_plan_and_preprocess as main; sys.exit(main())"
SHAPE_ZYX = (64, 160, 160)


def main() -> int:
    """Prints the table; 1 if any result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        task = write_task(root / "Lesions", options.cases)
        seconds = min(run(task, root / name) for name in ("undisturbed", "once more"))
        expected = contents(root / "undisturbed")
        if differences := compare(expected, contents(root / "once more")):
            raise SystemExit(f"Two undisturbed runs differ: {', '.join(differences)}")
        print(f"undisturbed: {seconds:.2f} s, {len(expected)} files\n")
        print(f"{'killed at':>10}{'files then':>12}{'run again':>11}  result")
        equal = 0
        for number, moment in enumerate(moments(options.moments, seconds, options.seed)):
            work = root / str(number)
            kill_at(moment, task, work)
            there = len(contents(work))
            again = run(task, work)
            differences = compare(expected, contents(work))
            equal += not differences
            print(f"{moment:>8.2f} s{there:>12}{again:>9.2f} s  {', '.join(differences) or 'equal'}", flush=True)
        print(f"\n{equal} of {options.moments} equal the undisturbed run byte for byte, with nothing left over")
        return int(equal != options.moments)


def write_task(folder: Path, cases: int, shape_zyx: tuple[int, int, int] = SHAPE_ZYX) -> Path:
    """A small segmentation task of CT and PET."""
    layout = {
        "shape_zyx": shape_zyx,
        "spacing_zyx_mm": tuple(320.0 / size for size in shape_zyx),
        "modalities": ("CT", "PET"),
    }
    return write_phantom_task(folder, "lesions", cases, 0, **layout)


def moments(number: int, seconds: float, seed: int) -> list[float]:
    """When to kill, in seconds from the start of a run that takes `seconds`."""
    return sorted(np.random.default_rng(seed).uniform(seconds / 4, seconds, number).tolist())


def start(task: Path, work: Path, **output) -> subprocess.Popen:
    """The command with two processes, in a process group of its own."""
    arguments = ["-t", str(task), "-w", str(work), "--device", "cpu", "--processes", "2"]
    return subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], start_new_session=True, **output)


def run(task: Path, work: Path) -> float:
    """Runs the command to its end; the seconds that it took."""
    started = time.monotonic()
    process = start(task, work, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"The command failed with status {process.returncode}:\n{errors}")
    return time.monotonic() - started


def kill_at(moment: float, task: Path, work: Path) -> None:
    """Starts the command and kills it and all its processes after `moment` seconds."""
    process = start(task, work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(moment)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def contents(work: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, and its digest."""
    files = (path for path in sorted(work.rglob("*")) if path.is_file())
    return {str(path.relative_to(work)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def compare(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """What differs, in words."""
    return [
        *(f"{file} is missing" for file in expected.keys() - found.keys()),
        *(f"{file} is left over" for file in found.keys() - expected.keys()),
        *(f"{file} differs" for file in expected.keys() & found.keys() if expected[file] != found[file]),
    ]


if __name__ == "__main__":
    sys.exit(main())
