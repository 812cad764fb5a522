"""Each device gets one implementation of every operator, and a CPU never loads Triton."""

import inspect
import subprocess
import sys
from dataclasses import fields

import pytest

from kernels import ops, reference

NAMES = [field.name for field in fields(ops.Operators) if field.name != "name"]


def test_a_cpu_has_the_reference():
    found = ops.for_device("cpu")
    assert found.name == "reference"
    assert all(getattr(found, name) is getattr(reference, name) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_triton_operator_takes_the_references_arguments(name):
    ours = inspect.signature(getattr(ops.for_device("cuda"), name))
    wanted = inspect.signature(getattr(reference, name))
    assert list(ours.parameters)[: len(wanted.parameters)] == list(wanted.parameters)


def test_binding_is_done_once():
    assert ops.for_device("cpu") is ops.for_device("cpu")


def test_a_cpu_process_loads_no_triton_kernels():
    code = "import sys; from kernels import ops; ops.for_device('cpu'); print(any(n.startswith('kernels.triton.') for n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
