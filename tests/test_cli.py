"""The command lines: what they cost, what they refuse, what they call, and what a person sees when it goes wrong."""

import importlib
import inspect
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unicon_pipeline import cli
from unicon_pipeline.budget import PRESETS, Machine
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.extension_plan import schedule_for
from unicon_pipeline.input_shape import Overrides

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = dict(
    re.findall(r'"(unicon_\w+) = unicon_pipeline\.cli:(main_\w+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
)
HEAVY = ("torch", "numpy", "scipy", "SimpleITK", "blosc2", "batchgenerators", "safetensors", "multiprocessing")

HELP = """
import sys
from unicon_pipeline import cli
try:
    getattr(cli, sys.argv[1])(["-h"])
except SystemExit as stop:
    code = stop.code
print("IMPORTED", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
sys.exit(code)
"""


def shell(function: str, *arguments: object) -> subprocess.CompletedProcess:
    """Runs a command as its console script does, in a new interpreter."""
    code = f"import sys; from unicon_pipeline.cli import {function}; sys.exit({function}())"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@dataclass
class Stand:
    """A stand-in for one function of the package; a call that the real one would refuse fails."""

    signature: inspect.Signature
    result: Any
    calls: list[dict[str, Any]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(dict(self.signature.bind(*args, **kwargs).arguments))
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result() if callable(self.result) else self.result


@pytest.fixture
def stand_in(monkeypatch) -> Callable[..., Stand]:
    def put(module: str, function: str, result: Any = None) -> Stand:
        home = importlib.import_module(f"unicon_pipeline.{module}")
        stand = Stand(inspect.signature(getattr(home, function)), result, [])
        monkeypatch.setattr(home, function, stand)
        return stand

    return put


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A work folder with the raw folders of two tasks, without images; read as segmentation tasks."""
    monkeypatch.delenv("UNICON_WORK", raising=False)
    read = SimpleNamespace(name="Lung", task_type="segmentation", region=None)
    monkeypatch.setattr("unicon_pipeline.dataset.read_task", lambda folder: read)
    for task in ("Liver", "Lung"):
        (tmp_path / "raw" / task).mkdir(parents=True)
        (tmp_path / "raw" / task / "dataset.json").write_text("{}")
    return tmp_path


@pytest.fixture
def plan_stands(stand_in):
    stand_in("model_record", "foundation_spec", "the spec")
    stand_in("plan", "format_plan", "the table")
    return stand_in("preprocess", "plan_and_preprocess", ("the plan", {}))


def test_every_script_of_setup_has_its_function_and_the_other_way_round():
    assert COMMANDS == {name.replace("main_", "unicon_"): name for name in dir(cli) if name.startswith("main_")}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command):
    done = subprocess.run(
        [sys.executable, "-c", HELP, COMMANDS[command]], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {command} ")
    imported = done.stderr.rpartition("IMPORTED")[2].split()
    assert "argparse" in imported
    assert not set(HEAVY) & set(imported)


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_option_is_refused(command, capsys):
    with pytest.raises(SystemExit) as stop:
        getattr(cli, COMMANDS[command])(["-i", ".", "-o", "x", "-t", "A", "-p", ".", "-c", "x", "--no-such-option"])
    assert stop.value.code == 2
    assert "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, arguments, complaint",
    [
        ("pretrain", [], "required: -t/--task"),
        ("plan_and_preprocess", [], "required: -t/--task"),
        ("extend", [], "required: -t/--task"),
        ("predict", ["-i", "."], "required: -o/--out"),
        ("predict", ["-o", "x"], "required: -i/--input"),
        ("evaluate", ["-t", "A"], "required: -p/--predictions"),
        ("predict", ["-i", "no/such/place", "-o", "x"], "no/such/place does not exist"),
        ("predict", ["-i", ".", "-o", __file__], "is a file"),
        ("predict", ["-i", ".", "-o", "x", "--precision", "int8"], "int8"),
        ("evaluate", ["-t", "A", "-p", __file__], "is not a folder"),
        ("evaluate", ["-t", "A", "-p", ".", "--tolerance", "nan"], "above 0"),
        ("extend", ["-t", "A", "--minutes", "0"], "above 0"),
        ("extend", ["-t", "A", "--minutes", "soon"], "above 0"),
        ("extend", ["-t", "A", "--epochs", "1.5"], "at least 1"),
        ("extend", ["-t", "A", "--epochs", "0"], "at least 1"),
        ("extend", ["-t", "A", "--fold", "-1"], "fold"),
        ("extend", ["-t", "A", "--fold", "some"], "fold"),
        ("extend", ["-t", "A", "--seed", str(2**32)], "whole number"),
        ("extend", ["-t", "A", "--device", "gpu"], "gpu"),
        ("extend", ["-t", "A", "--dry"], "--dry"),
        ("plan_and_preprocess", ["-t", "A", "--spacing", "1", "1"], "--spacing"),
        ("plan_and_preprocess", ["-t", "A", "--patch", "8", "8", "0"], "at least 1"),
    ],
)
def test_bad_options_are_refused_before_any_work(command, arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        getattr(cli, f"main_{command}")(arguments)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


def test_work_and_model_defaults(stand_in, monkeypatch, tmp_path, capsys):
    stand = stand_in("info", "describe", {})
    monkeypatch.delenv("UNICON_WORK", raising=False)
    cli.main_info(["--json"])
    monkeypatch.setenv("UNICON_WORK", str(tmp_path / "from the environment"))
    cli.main_info(["--json"])
    cli.main_info(["--json", "-w", str(tmp_path)])
    cli.main_info(["--json", "-w", str(tmp_path), "-m", "elsewhere"])
    expected = [Path("unicon_work/model"), tmp_path / "from the environment/model", tmp_path / "model", "elsewhere"]
    assert [str(next(iter(call.values()))) for call in stand.calls] == [str(path) for path in expected]


def test_an_error_for_a_person_is_a_message_and_status_2(tmp_path):
    done = shell("main_evaluate", "-t", "NoSuchTask", "-p", tmp_path, "-w", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "NoSuchTask" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_debug_adds_the_traceback(tmp_path):
    done = shell("main_evaluate", "-t", "NoSuchTask", "-p", tmp_path, "-w", tmp_path, "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "DatasetError" in done.stderr


@pytest.mark.parametrize(
    "problem, status, said, unsaid",
    [
        (DatasetError("the image is bad"), 2, "error: the image is bad", "bug"),
        (OSError(28, "No space left on device", "x.nii.gz"), 2, "No space left on device: 'x.nii.gz'", "bug"),
        (MemoryError(), 2, "not enough memory", "bug"),
        (ZeroDivisionError("division\nby zero"), 2, "ZeroDivisionError: division by zero -- this is a bug", "File"),
        (KeyboardInterrupt(), 130, "interrupted\n", "bug"),
    ],
)
def test_every_exception_has_its_status_and_one_line(problem, status, said, unsaid, stand_in, capsys):
    stand_in("demo", "run_demo", problem)
    assert cli.main_demo([]) == status
    error = capsys.readouterr().err
    assert said in error
    assert unsaid not in error
    assert "Traceback" not in error
    assert error.count("\n") == 1


def test_a_bug_tells_how_to_see_more(stand_in, capsys):
    stand_in("demo", "run_demo", ZeroDivisionError("oh"))
    cli.main_demo([])
    assert "run with --debug" in capsys.readouterr().err
    assert cli.main_demo(["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, heard",
    [
        ([], "told\nwarning: careful\n"),
        (["--quiet"], "warning: careful\n"),
        (["--debug"], "unicon_pipeline.part: detail\n"),
    ],
)
def test_messages_go_to_stderr_once_however_often_a_command_runs(options, heard, stand_in, capsys):
    part = logging.getLogger("unicon_pipeline.part")

    def speak() -> int:
        part.debug("detail")
        part.info("told")
        part.warning("careful")
        return 0

    stand_in("demo", "run_demo", speak)
    cli.main_demo(options)
    capsys.readouterr()
    cli.main_demo(options)
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(heard)
    assert error.count("careful") == 1


def test_demo_passes_its_options_and_status(stand_in, tmp_path):
    stand = stand_in("demo", "run_demo", 1)
    assert cli.main_demo(["-o", str(tmp_path), "--quick", "--seed", "7"]) == 1
    assert list(stand.calls[0].values()) == [tmp_path, True, 7]


def test_pretrain_passes_its_options(stand_in, work, capsys):
    stand = stand_in("pretrain", "pretrain", work / "model")
    arguments = ["-t", "Lung", "-w", str(work), "--minutes", "2.5", "--epochs", "3", "--licence", "MIT"]
    assert cli.main_pretrain([*arguments, "--device", "cpu", "--seed", "5"]) == 0
    (call,) = stand.calls
    assert list(call.values())[:3] == [work / "raw" / "Lung", work, work / "model"]
    named = {"minutes": 2.5, "epochs": 3, "device": "cpu", "seed": 5, "licence": "MIT"}
    assert named.items() <= call.items()
    assert str(work / "model") in capsys.readouterr().out


def test_plan_passes_overrides_in_zyx_order(plan_stands, work, capsys):
    overrides = ["--spacing", "3", "2", "1.5", "--patch", "16", "32", "48", "--batch", "2", "--folds", "4"]
    arguments = ["-t", "Lung", "-w", str(work), "--device", "cpu", "--processes", "1", "--memory-gb", "4"]
    assert cli.main_plan_and_preprocess([*arguments, *overrides]) == 0
    expected = {
        "machine": Machine(4.0, True, "memory set by the user"),
        "processes": 1,
        "overrides": Overrides((3.0, 2.0, 1.5), (16, 32, 48), 2, 4),
    }
    assert expected.items() <= plan_stands.calls[0].items()
    assert capsys.readouterr().out == "the table\n"


def test_plan_leaves_to_the_planner_what_was_not_set(plan_stands, work):
    assert cli.main_plan_and_preprocess(["-t", "Lung", "-w", str(work), "--device", "cpu"]) == 0
    (call,) = plan_stands.calls
    assert (call["processes"], call["overrides"]) == (None, Overrides())
    assert (call["machine"].memory_gb, call["machine"].on_cpu) == (2.0, True)


def test_plan_for_another_machine(plan_stands, work):
    assert cli.main_plan_and_preprocess(["-t", "Lung", "-w", str(work), "--preset", "gpu24"]) == 0
    assert plan_stands.calls[0]["machine"] == PRESETS["gpu24"]


@pytest.mark.parametrize(
    "outcomes, status",
    [
        ([("p", {}), ("p", {})], 0),
        ([("p", {"case_1": "truncated"}), ("p", {})], 1),
        ([DatasetError("truncated"), ("p", {})], 1),
        ([("p", {}), DatasetError("truncated")], 1),
        ([DatasetError("truncated"), DatasetError("truncated")], 2),
    ],
)
def test_one_task_does_not_stop_the_others(outcomes, status, plan_stands, work, capsys):
    remaining = list(outcomes)

    def next_outcome():
        outcome = remaining.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    plan_stands.result = next_outcome
    assert cli.main_plan_and_preprocess(["-t", "Liver", "Lung", "-w", str(work), "--device", "cpu"]) == status
    assert not remaining
    assert ("truncated" in capsys.readouterr().err) == (status > 0)


def test_extend_passes_its_options(stand_in, work, capsys):
    stand = stand_in("extend", "extend", SimpleNamespace(summary=lambda: "extended"))
    arguments = ["-t", "Lung", "-w", str(work), "-m", str(work / "m"), "--fold", "3", "--minutes", "1"]
    assert cli.main_extend([*arguments, "--device", "cpu", "--precision", "fp32", "--seed", "2"]) == 0
    assert cli.main_extend(["-t", "Lung", "-w", str(work), "--restart"]) == 0
    first, second = stand.calls
    assert list(first.values())[:3] == [work / "raw" / "Lung", work, work / "m"]
    named = {"fold": 3, "schedule": schedule_for(1.0, None), "device": "cpu", "seed": 2, "resume": True}
    assert named.items() <= first.items()
    assert {"fold": "all", "schedule": schedule_for(None, None), "resume": False}.items() <= second.items()
    assert capsys.readouterr().out == "extended\n" * 2


@pytest.mark.parametrize("option", [("--loss", "cox"), ("--all-descriptors",), ("--adapter-rank", "2")])
def test_options_of_case_level_tasks_are_refused_for_others(option, work, capsys):
    assert cli.main_extend(["-t", "Lung", "-w", str(work), *option]) == 2
    assert f"{option[0]}: Lung is a segmentation task" in capsys.readouterr().err


def test_a_case_level_task_gets_its_options(stand_in, work, monkeypatch):
    task = SimpleNamespace(name="Lung", task_type="prognosis", region=None)
    monkeypatch.setattr("unicon_pipeline.dataset.read_task", lambda folder: task)
    stand = stand_in("case_extend", "extend_case", SimpleNamespace(summary=lambda: "extended"))
    arguments = ["-t", "Lung", "-w", str(work), "--loss", "cox", "--inputs", "image", "clinical", "--repeats", "2"]
    assert cli.main_extend([*arguments, "--fold", "1", "--seed", "3", "--device", "cpu"]) == 0
    assert cli.main_extend([*arguments[:4], "--adapter-rank", "2", "--epochs", "7", "--minutes", "9", "--restart"]) == 0
    first, second = stand.calls
    options = first["options"]
    assert (options.loss, options.inputs, options.rounds, options.epochs) == ("cox", ("image", "clinical"), 2, 60)
    assert (first["fold"], first["seed"], first["device"], options.adapter_rank) == (1, 3, "cpu", 0)
    options = second["options"]
    assert (options.adapter_rank, options.adapter_epochs, options.minutes, options.rounds) == (2, 7, 9.0, 1)
    assert first["resume"] and not second["resume"]


def test_a_dry_run_prints_the_plan_and_trains_nothing(stand_in, work, capsys):
    trained = stand_in("extend", "extend")
    stand = stand_in("extend", "plan_for", ("planned", "the extension"))
    stand_in("extension_plan", "format_extension", "the table")
    assert cli.main_extend(["-t", "Lung", "-w", str(work), "--fold", "1", "--dry-run"]) == 0
    assert {"fold": 1, "seed": 0}.items() <= stand.calls[0].items()
    assert capsys.readouterr().out == "the table\n"
    assert not trained.calls


@pytest.mark.parametrize("status", [0, 1, 2])
def test_predict_passes_its_options_and_status(status, stand_in, work, capsys):
    report = SimpleNamespace(summary=lambda: "summary", exit_code=status)
    stand = stand_in("predict", "predict_folder", report)
    arguments = ["-i", str(work), "-o", str(work / "out"), "-m", str(work / "m"), "-t", "A", "B"]
    assert cli.main_predict([*arguments, "--save-probabilities", "--precision", "bf16"]) == status
    (call,) = stand.calls
    assert list(call.values())[:3] == [work, work / "out", work / "m"]
    assert (call["tasks"], call["save_probabilities"], call["resume"], call["part"]) == (["A", "B"], True, False, None)
    named = {"device": "auto", "precision": "bf16", "tta": False, "compute_air": False}
    assert named.items() <= {**call, **call.get("options", {})}.items()
    assert capsys.readouterr().out == "summary\n"


def test_evaluate_prints_json_or_the_table(stand_in, work, capsys):
    from unicon_pipeline.evaluate import Evaluation

    result = Evaluation("Lung", "segmentation", 3.0, 0, 0, (), {}, {}, (), (), {})
    stand_in("dataset", "read_task", "the task")
    stand = stand_in("evaluate", "evaluate", result)
    stand_in("evaluate", "format_evaluation", "the table")
    arguments = ["-t", "Lung", "-w", str(work), "-p", str(work), "--tolerance", "3"]
    assert cli.main_evaluate(arguments) == 0
    assert capsys.readouterr().out == "the table\n"
    assert cli.main_evaluate([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tolerance_mm"] == 3.0
    assert {"task": "the task", "predictions": work, "tolerance_mm": 3.0}.items() <= stand.calls[0].items()


def test_evaluate_with_failed_cases_is_status_1(stand_in, work, capsys):
    from unicon_pipeline.evaluate import Evaluation

    result = Evaluation("Lung", "segmentation", 2.0, 0, 0, (), {}, {}, (), (), {"case_1": "wrong grid"})
    stand_in("dataset", "read_task", "the task")
    stand_in("evaluate", "evaluate", result)
    stand_in("evaluate", "format_evaluation", "the table")
    assert cli.main_evaluate(["-t", "Lung", "-w", str(work), "-p", str(work)]) == 1
    assert cli.main_evaluate(["-t", "Lung", "-w", str(work), "-p", str(work), "--json"]) == 1
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["failed"] == {"case_1": "wrong grid"}


def test_verify_tells_what_is_wrong(stand_in, work, capsys):
    from unicon_pipeline.verify import VerifyReport

    fields = {name: () for name in inspect.signature(VerifyReport).parameters}
    good = VerifyReport(**{**fields, "ok": True, "problems": ()})
    bad = VerifyReport(**{**fields, "ok": False, "problems": ("weights.safetensors changed",)})
    stand_in("verify", "verify", good)
    assert cli.main_verify(["-w", str(work)]) == 0
    assert ": intact" in capsys.readouterr().out
    stand_in("verify", "verify", bad)
    assert cli.main_verify(["-w", str(work)]) == 1
    out = capsys.readouterr().out
    assert "weights.safetensors changed" in out
    assert "NOT intact" in out
    assert cli.main_verify(["-w", str(work), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == ["weights.safetensors changed"]


def test_info_prints_json_or_text(stand_in, work, capsys):
    stand_in("info", "describe", {"tasks": ["Lung"]})
    stand_in("info", "format_description", "the text")
    assert cli.main_info(["-w", str(work)]) == 0
    assert capsys.readouterr().out == "the text\n"
    assert cli.main_info(["-w", str(work), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"tasks": ["Lung"]}


def test_a_reader_that_leaves_early_is_no_error():
    code = """
import sys
from unicon_pipeline import command_line
for _ in range(9999):
    command_line.show("x" * 100)
sys.stderr.write("on")
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 0
    assert error == "on"
