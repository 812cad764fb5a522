"""The house's greppable rules: what may stand where. Imports between rooms are import-linter's (`make lint`)."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"schemas", "kernels", "engine", "service", "tests", "deploy"}
PRODUCT = ("engine", "kernels", "service")
MAX_LINES = 400

# Where time, chance and identity enter: the composition root; the commands, each the root of its own process; the client library,
# which lives in its caller's process and takes its draws as an argument.
SEAMS = ("service/app.py", "service/cli/", "service/rpc/client.py")
INJECTED = {"time.time", "time.time_ns", "uuid.uuid4", "uuid.uuid1", "datetime.now", "datetime.datetime.now"}
FORBIDDEN_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "numpy.load", "np.load", "torch.jit.load"}

# The three supervised boundaries: the worker's loop, each transport's handler of one message, the composition root.
BROAD_ALLOWED = (
    "engine/worker.py",
    "service/app.py",
    "service/kafka/",
    "service/rpc/servicer.py",
    "service/http/",
    "service/bench/drive.py",
)

TRITON_TWINS = ("paged_attention", "rotary_kv_write", "rms_norm", "add_rms_norm")


def python_files(*rooms: str) -> list[Path]:
    """The project's own Python files below these folders; generated code left out."""
    found = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    return [path for path in found if "_pb2" not in path.name]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a chain of names; "" for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, dotted(node.func)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def find_injected(tree: ast.AST) -> list[int]:
    """Lines that read the wall clock, draw chance or make an id themselves."""
    lines = [line for line, name in calls(tree) if name in INJECTED or name.startswith("random.")]
    return lines + [line for line, name in imports(tree) if name in INJECTED or name.split(".")[0] == "random"]


def find_unsafe(tree: ast.AST) -> list[int]:
    """Lines that could run what they read."""
    lines = [line for line, name in calls(tree) if name in FORBIDDEN_CALLS]
    return lines + [line for line, name in imports(tree) if name.split(".")[0] in FORBIDDEN_IMPORTS]


def find_broad_excepts(tree: ast.AST) -> list[int]:
    """Lines of handlers that take every exception and do not raise at their end."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        is_broad = any(one is None or dotted(one) in ("Exception", "BaseException") for one in caught)
        if is_broad and not isinstance(node.body[-1], ast.Raise):
            lines.append(node.lineno)
    return lines


def find_untied(tree: ast.AST) -> list[int]:
    """Lines that start a process which nothing ends when this one is killed, in a file that ties none."""
    made = [line for line, name in calls(tree) if name.split(".")[-1] in ("Popen", "create_subprocess_exec")]
    return [] if any(name == "tie" for _, name in calls(tree)) else made


def hits(finder: object, allowed: tuple[str, ...] = ()) -> list[str]:
    """file:line of everything that `finder` finds in the product outside the allowed places."""
    assert callable(finder)
    found = []
    for path in python_files(*PRODUCT):
        if not name_of(path).startswith(allowed or ("\0",)):
            found += [f"{name_of(path)}:{line}" for line in finder(ast.parse(path.read_text("utf-8")))]
    return found


def test_only_the_houses_folders_exist_beside_dot_folders() -> None:
    ours = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    folders = {line.split("/")[0] for line in ours.stdout.splitlines() if "/" in line and not line.startswith(".")}
    assert folders <= FOLDERS


def test_clock_chance_and_ids_are_injected() -> None:
    assert hits(find_injected, SEAMS) == []


def test_nothing_runs_what_it_reads() -> None:
    assert hits(find_unsafe) == []


def test_broad_excepts_stand_at_supervised_boundaries_only() -> None:
    assert hits(find_broad_excepts, BROAD_ALLOWED) == []


def test_processes_of_tests_and_benchmarks_end_with_them() -> None:
    rooms = ("tests/bench", "tests/chaos", "tests/integration", "tests/servers")
    files = [path for path in python_files(*rooms) if path.name not in ("tied.py", "test_tied.py")]
    assert [name_of(path) for path in files if find_untied(ast.parse(path.read_text("utf-8")))] == []


@pytest.mark.parametrize(
    ("finder", "source"),
    [
        (find_injected, "import time\ntime.time()"),
        (find_injected, "from time import time"),
        (find_injected, "import random"),
        (find_injected, "import uuid\nuuid.uuid4()"),
        (find_unsafe, "import pickle"),
        (find_unsafe, "from pickle import loads"),
        (find_unsafe, "import torch\ntorch.load('x')"),
        (find_unsafe, "eval('1')"),
        (find_untied, "import subprocess\nsubprocess.Popen(['x'])"),
        (find_broad_excepts, "try:\n  x()\nexcept Exception:\n  pass"),
        (find_broad_excepts, "try:\n  x()\nexcept:\n  pass"),
        (find_broad_excepts, "try:\n  x()\nexcept (ValueError, BaseException):\n  pass"),
    ],
)
def test_each_rule_fires(finder: object, source: str) -> None:
    assert callable(finder)
    assert finder(ast.parse(source)) != []


@pytest.mark.parametrize(
    "source", ["try:\n  x()\nexcept BaseException:\n  y()\n  raise", "try:\n  x()\nexcept OSError:\n  pass"]
)
def test_a_handler_that_raises_or_names_its_error_is_allowed(source: str) -> None:
    assert find_broad_excepts(ast.parse(source)) == []


def test_packages_faces_hold_only_imports_and_names() -> None:
    wrong = []
    for path in python_files(*PRODUCT):
        if path.name != "__init__.py":
            continue
        for node in ast.parse(path.read_text("utf-8")).body:
            is_doc = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_all = isinstance(node, ast.Assign) and [dotted(target) for target in node.targets] == ["__all__"]
            # PEP 562: how a face gives a name lazily.
            is_lazy = isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
            is_typing = isinstance(node, ast.If) and dotted(node.test) == "TYPE_CHECKING"
            if not (isinstance(node, ast.Import | ast.ImportFrom) or is_doc or is_all or is_lazy or is_typing):
                wrong.append(f"{name_of(path)}:{node.lineno}")
    assert wrong == []


def test_no_file_is_longer_than_400_lines() -> None:
    sizes = {name_of(path): len(path.read_text("utf-8").splitlines()) for path in python_files(*PRODUCT, "tests")}
    assert {name: size for name, size in sizes.items() if size > MAX_LINES} == {}


def modules_without_tensors() -> list[str]:
    """The engine's face with what the service imports of it, the torch-free scheduler, and the service's own files."""
    service = [f"service.{path.stem}" for path in sorted((ROOT / "service").glob("*.py")) if path.stem != "__init__"]
    return ["engine", "engine.frames", "engine.scheduling.scheduler", *service]


def test_the_service_and_the_engines_face_load_no_torch() -> None:
    code = f"import sys, {', '.join(modules_without_tensors())}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def operators() -> list[str]:
    """The public functions of the operators' specification."""
    tree = ast.parse((ROOT / "kernels/reference.py").read_text("utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


@pytest.mark.parametrize("operator", operators())
def test_each_operator_has_a_test(operator: str) -> None:
    tests = [path.read_text("utf-8") for path in python_files("tests/kernels")]
    assert any(re.search(rf"\b{operator}\b", text) for text in tests)


@pytest.mark.parametrize("operator", TRITON_TWINS)
def test_each_operator_of_the_gpu_path_has_a_triton_twin_with_the_same_arguments(operator: str) -> None:
    def arguments(path: Path) -> list[list[str]]:
        tree = ast.parse(path.read_text("utf-8"))
        return [
            [argument.arg for argument in node.args.args]
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.name == operator
        ]

    (wanted,) = arguments(ROOT / "kernels/reference.py")
    assert [found for path in python_files("kernels/triton") for found in arguments(path)] == [wanted]


def test_an_error_table_in_the_readme_is_the_list_of_codes() -> None:
    from service.errors import CODES

    text = (ROOT / "README.md").read_text("utf-8")
    rows = [row.group(1) for row in re.finditer(r"^\| `([a-z_]+)` \|", text, re.MULTILINE)]
    listed = [code for code in rows if code in CODES]
    # The README may link to the list instead of showing it; what it shows is whole and in order.
    assert listed in ([], list(CODES))
