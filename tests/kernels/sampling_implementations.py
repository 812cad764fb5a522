"""The implementations of the sampling operators that this machine can run."""

from kernels import ops

IMPLEMENTATIONS = (ops.for_device("cpu"),)
