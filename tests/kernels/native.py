"""The C++ operators of each instruction set of this machine, for tests; imported where it is wanted, since it builds them."""

from collections.abc import Iterator

import pytest
import torch

from kernels.cpu import choose
from kernels.cpu.build import runnable


@pytest.fixture(params=runnable())
def native(request: pytest.FixtureRequest) -> Iterator[object]:
    """The operators of one instruction set; what they leave unwritten is NaN, and no token."""
    choose(request.param)
    torch.use_deterministic_algorithms(True)
    yield torch.ops.sluice_cpu
    torch.use_deterministic_algorithms(False)
    choose("auto")
