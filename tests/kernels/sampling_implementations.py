"""The implementations of the sampling operators that this machine can run: plain torch, and C++ in every instruction set."""

from kernels import ops
from kernels.cpu.build import runnable

IMPLEMENTATIONS = ("torch", *runnable())


def operators_of(name: str) -> ops.Operators:
    """The last one asked for is the one that runs."""
    return ops.for_device("cpu", name)
