"""Each device gets one implementation of every operator, and a CPU never loads Triton."""

import inspect
import subprocess
import sys
from dataclasses import fields

import pytest

from kernels import ops, reference
from kernels.cpu import BuildError
from kernels.cpu.build import runnable

PACKED = ("pack_weight", "linear", "pack_screen", "greedy_linear")
NAMES = [
    field.name
    for field in fields(ops.Operators)
    if field.name not in ("name", "reason", "attends", "hidden_dtype", "record", "rounds_rows", "single_tokens", *PACKED)
]


def test_a_cpu_without_native_operators_has_the_reference():
    found = ops.for_device("cpu", "torch")
    assert (found.name, found.reason) == ("reference", "plain torch, as configured")
    assert all(getattr(found, name) is getattr(reference, name) for name in NAMES)


def test_a_cpu_with_a_compiler_has_the_best_instruction_set():
    assert ops.for_device("cpu").name == f"cpu_{runnable()[0]}"


def test_an_instruction_set_that_the_processor_lacks_is_refused_by_name():
    with pytest.raises(BuildError, match=r"'avx9' is not one that this processor has: .*scalar"):
        ops.for_device("cpu", "avx9")


@pytest.mark.parametrize("name", PACKED)
def test_a_native_linear_takes_the_references_arguments(name):
    schema = getattr(ops.for_device("cpu"), name)._schema
    wanted = list(inspect.signature(getattr(reference, name)).parameters.values())
    given = [argument.name for argument in schema.arguments]
    assert given == [parameter.name for parameter in wanted[: len(given)]]
    # What the processor itself decides, the reference is told.
    assert all(parameter.default is not parameter.empty for parameter in wanted[len(given) :])


@pytest.mark.parametrize("name", NAMES)
def test_the_triton_operator_takes_the_references_arguments(name):
    ours = inspect.signature(getattr(ops.for_device("cuda"), name))
    wanted = inspect.signature(getattr(reference, name))
    assert list(ours.parameters)[: len(wanted.parameters)] == list(wanted.parameters)


def test_binding_is_done_once():
    assert ops.for_device("cpu") is ops.for_device("cpu")
    assert ops.for_device("cuda") is ops.for_device("cuda")


def test_a_cpu_process_loads_no_triton_kernels():
    code = "import sys; from kernels import ops; ops.for_device('cpu'); print(any(n.startswith('kernels.triton.') for n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
