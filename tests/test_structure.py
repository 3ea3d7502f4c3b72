"""The shape of the package: sizes, import order, what may appear where. Read from the source, not from memory."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import unicon_pipeline

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "unicon_pipeline"
SOURCES = sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "dataset_conversion").rglob("*.py"))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 9

# A module imports only from modules before it in this list.
ORDER = """
    errors folder_lock records contract levels registry decisions progress workers dask_cluster voxels nifti
    geometry descriptors label_spec description spreadsheet tables clinical dataset case_reading folds
    cross_validation suv phantom_scene phantom_render phantoms resize region label_resize intensity air histogram
    measure cohort fingerprint budget input_shape plan prepare store preprocess extension_plan model_record device
    machine weights checkpoint foundation native lean_blocks families families.dna_encoders stems adapters heads
    case_head model model_folder imported families.nnunet_plans families.nnunet families.inflated_resnet
    families.ctvit families.zero_shot families.monai_encoders families.primus families.nnssl losses survival augment
    loader metrics survival_metrics case_answers class_metrics baselines case_report case_fit case_plan case_folds
    training case_training case_adapter sliding_window inference_form case_prediction export evidence verify
    case_extend importer extend pretrain prediction_run predictor predict case_regions case_evaluate array_api
    evaluate info demo option_types command_line cli_extend cli
""".split()

TORCH_FREE = """
    errors folder_lock records contract levels registry decisions progress workers dask_cluster voxels nifti
    geometry descriptors label_spec description spreadsheet tables clinical dataset case_reading folds
    cross_validation suv phantom_scene phantom_render phantoms resize region label_resize intensity air histogram
    measure cohort fingerprint budget input_shape plan prepare store preprocess extension_plan model_record info
    augment loader metrics survival_metrics class_metrics baselines case_report export case_evaluate evaluate
    option_types command_line cli_extend cli
""".split()

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT).as_posix()}:{node.lineno}"


def imported_modules(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Each dotted name that is imported anywhere in the file, inside functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node, "." * node.level + (node.module or "")
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    every = function.args
    names = [argument.arg for argument in (*every.posonlyargs, *every.args, *every.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def is_mutable_default(node: ast.expr | None) -> bool:
    literal = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    return isinstance(node, literal) or (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"list", "dict", "set", "bytearray", "defaultdict", "Counter", "deque"}
    )


def keyword(call: ast.Call, name: str) -> object:
    return next((ast.unparse(item.value) for item in call.keywords if item.arg == name), None)


def unsafe_call(call: ast.Call) -> str | None:
    """The reason why a call could run code that a file carries, or None."""
    name = ast.unparse(call.func)
    if name in ("torch.load", "load_state_dict_from_url") and keyword(call, "weights_only") != "True":
        return f"{name} without weights_only=True"
    if name in ("np.load", "numpy.load") and keyword(call, "allow_pickle") not in (None, "False"):
        return f"{name} with allow_pickle"
    if name in ("eval", "exec", "compile", "torch.jit.load", "yaml.load", "yaml.unsafe_load"):
        return name
    return "allow_unsafe" if keyword(call, "allow_unsafe") else None


def test_the_sources_are_found():
    assert PACKAGE / "errors.py" in SOURCES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
class TestEverySource:
    def test_file_is_short(self, path):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES

    def test_functions_are_short(self, path):
        long = {
            place(path, function): function.end_lineno - function.lineno + 1
            for function in functions(path)
            if function.end_lineno - function.lineno + 1 > MAX_FUNCTION_LINES
        }
        assert not long

    def test_functions_take_few_parameters(self, path):
        many = {place(path, f): parameters(f) for f in functions(path) if len(parameters(f)) > MAX_PARAMETERS}
        assert not many

    def test_no_default_is_mutable(self, path):
        mutable = [
            place(path, default)
            for function in functions(path)
            for default in (*function.args.defaults, *function.args.kw_defaults)
            if is_mutable_default(default)
        ]
        assert not mutable

    def test_no_bare_except(self, path):
        handlers = (node for node in ast.walk(tree(path)) if isinstance(node, ast.ExceptHandler))
        assert not [place(path, handler) for handler in handlers if handler.type is None]

    def test_no_assert_statement(self, path):
        assert not [place(path, node) for node in ast.walk(tree(path)) if isinstance(node, ast.Assert)]

    def test_nothing_unpickles_or_evaluates(self, path):
        imports = [place(path, node) for node, name in imported_modules(path) if name.split(".")[0] in UNPICKLERS]
        calls = [
            f"{place(path, node)} {unsafe_call(node)}"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Call) and unsafe_call(node)
        ]
        assert not imports + calls

    def test_only_the_command_line_reads_the_environment(self, path):
        if path.name == "command_line.py":
            return
        uses = [
            place(path, node)
            for node in ast.walk(tree(path))
            if (isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT)
            or (isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} & ENVIRONMENT)
        ]
        assert not uses

    def test_exit_is_left_to_the_command_line(self, path):
        if path.name == "command_line.py" or path.parent.name == "dataset_conversion":
            return
        calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        exits = ("sys.exit", "exit", "quit")  # a worker process may end itself with os._exit
        assert not [place(path, call) for call in calls if ast.unparse(call.func) in exits]


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def _source(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_every_module_has_a_place_in_the_order():
    modules = {_dotted(path) for path in PACKAGE.rglob("*.py")} - {""}
    assert modules == set(ORDER)
    assert len(ORDER) == len(set(ORDER))
    assert {path.parent.name for path in PACKAGE.glob("*/**/*.py")} == {"families"}


def test_modules_import_only_from_modules_before_them():
    wrong = []
    for position, module in enumerate(ORDER):
        path = _source(module)
        earlier = set(ORDER[:position]) | {"__version__"}
        for node, name in imported_modules(path) if path.exists() else ():
            parts = name.split(".")
            ours = parts[0] == "unicon_pipeline" and len(parts) > 1
            if not parts[0] or (ours and parts[1] not in earlier and ".".join(parts[1:3]) not in earlier):
                wrong.append(f"{place(path, node)} imports {name}")
    assert not wrong


def test_torch_free_modules_import_no_torch():
    modules = [module for module in TORCH_FREE if (PACKAGE / f"{module}.py").exists()]
    code = "\n".join(
        [
            "import importlib, sys",
            f"for module in {['', *modules]!r}:",
            "    importlib.import_module('unicon_pipeline' + ('.' + module if module else ''))",
            "    if 'torch' in sys.modules:",
            "        sys.exit('torch comes with ' + (module or 'the package'))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", unicon_pipeline.__all__)
def test_public_name_resolves(name):
    assert getattr(unicon_pipeline, name) is not None
    assert name in dir(unicon_pipeline)


@pytest.mark.parametrize("verb, function", unicon_pipeline._VERBS.items())
def test_calling_a_verb_calls_its_function(verb, function, monkeypatch):
    module = getattr(unicon_pipeline, verb)
    assert module is importlib.import_module(f"unicon_pipeline.{verb}")
    called = []
    monkeypatch.setattr(module, function, lambda *args, **kwargs: called.append((args, kwargs)))
    module(1, two=2)
    assert called == [((1,), {"two": 2})]


@pytest.mark.parametrize(
    "first", ["import unicon_pipeline.evaluate", "from unicon_pipeline.evaluate import evaluate", "pass"]
)
def test_a_verb_is_callable_whatever_was_imported_first(first):
    code = f"{first}\nimport sys, unicon_pipeline\nsys.exit(not callable(unicon_pipeline.evaluate))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = unicon_pipeline.no_such_name


def test_version_is_stated_once_and_read_by_setup():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+", unicon_pipeline.__version__)
    assert unicon_pipeline.__version__ not in text
