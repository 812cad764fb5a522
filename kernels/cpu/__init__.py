"""The operators in C++ for a CPU: built once into the cache, chosen by instruction set."""

from kernels.cpu.build import NATIVE, BuildError, Choice, choose

__all__ = ["NATIVE", "BuildError", "Choice", "choose"]
