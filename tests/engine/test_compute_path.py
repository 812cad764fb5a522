"""What `sluice doctor` learns of the computing: the operators that the engine would bind, asked in a process of its own."""

import json
import subprocess
import sys

import pytest

from kernels.cpu.build import runnable


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engine.compute_path", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("cpu_isa", "operators", "reason"),
    [
        ("scalar", "cpu_scalar", "C++ operators with scalar, as configured"),
        ("auto", f"cpu_{runnable()[0]}", f"C++ operators with {runnable()[0]}, the best that this processor has"),
        ("torch", "reference", "plain torch, as configured"),
    ],
)
def test_the_operators_and_why(cpu_isa, operators, reason):
    done = ask("cpu", cpu_isa, "1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["operators"], found["reason"]) == (operators, reason)
    assert (found["on_cpu"], found["threads"]) == (True, 1)


def test_a_device_that_is_not_there_is_an_error_of_the_configuration():
    done = ask("cuda:99", "auto", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "cuda:99" in done.stderr
    assert "Traceback" not in done.stderr
