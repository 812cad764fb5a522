"""The instruction sets that this machine lacks, emulated: every test of the C++ operators once more."""

import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu.build import runnable
from tests.servers.prepare import SIMDE

ROOT = Path(__file__).resolve().parents[2]
SUITES = ("test_cpu_linear.py", "test_narrow.py", "test_greedy_linear.py", "test_cpu_attention.py", "test_sampling.py")


@pytest.mark.skipif(
    {"amx", "avx512_bf16"} <= set(runnable()),
    reason="nothing to emulate: the suites run every instruction set on this processor",
)
@pytest.mark.skipif(
    not SIMDE.exists(),
    reason=f"{SIMDE} is missing (libsimde-dev): it runs where that is, as on Debian as root, where `make test` installs it",
)
@pytest.mark.timeout(900)  # the first builds what is emulated
@pytest.mark.parametrize("suite", SUITES)
def test_the_operators_of_what_this_processor_lacks_are_their_twins(suite: str) -> None:
    arguments = ["-p", "tests.kernels.emulation.plugin", "-q", "-x", "-k", "not fuzz", f"tests/kernels/{suite}"]
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
