"""Each operator's Triton kernel against the reference, in Triton's interpreter: one child run, reported here file by file."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "triton_interpreter"
FILES = sorted(path.stem for path in FOLDER.glob("test_*.py"))
Cases = dict[str, list[ElementTree.Element]]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """The child's test cases by file. Fails with the child's words when it does not come to its end."""
    report = tmp_path_factory.mktemp("interpreter") / "report.xml"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # An interpreted kernel keeps one core busy. Two workers at least: who reads the report has one way to read it.
    workers = str(max(2, os.cpu_count() or 1))
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-n", workers, "--dist", "worksteal", f"--junitxml={report}"]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(FOLDER)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if child.returncode not in (0, 1):
        pytest.fail(f"the interpreter's process ended with {child.returncode}\n{child.stdout[-8000:]}\n{child.stderr[-4000:]}")
    found: Cases = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found.setdefault(case.get("classname", "").rpartition(".")[2], []).append(case)
    return found


@pytest.mark.timeout(620)
@pytest.mark.parametrize("name", FILES)
def test_kernels_match_the_reference_in_the_interpreter(name: str, cases: Cases) -> None:
    assert cases.get(name), f"nothing of {name} was run"
    bad = [
        f"{case.get('name')}:\n{mark.text}"
        for case in cases[name]
        for mark in case
        if mark.tag in {"failure", "error", "skipped"}
    ]
    assert not bad, "\n\n".join(bad)


def test_every_operator_has_a_file() -> None:
    operators = {"paged_attention", "rms_norm", "rotary_kv_write", "sampling", "silu_mul"}
    assert {name.removeprefix("test_") for name in FILES} >= operators
