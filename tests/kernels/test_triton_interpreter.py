"""Each operator's Triton kernel against the reference, in Triton's interpreter: one child process a file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((Path(__file__).parent / "triton_interpreter").glob("test_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_match_the_reference_in_the_interpreter(path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(path)]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    # Exit code 5, nothing collected, is a failure too.
    assert child.returncode == 0, f"{' '.join(command)}\n{child.stdout[-12000:]}\n{child.stderr[-4000:]}"


def test_every_operator_has_a_file() -> None:
    operators = {"paged_attention", "rms_norm", "rotary_kv_write", "silu_mul"}
    assert {path.stem.removeprefix("test_") for path in FILES} >= operators
