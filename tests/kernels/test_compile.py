"""Every kernel and tuning row compiles for GPUs that need not be here: no spilled register, shared memory within the limit.

`make kernels` does the same for the desktop parts (sm_86) and all of gfx942, and prints the figures.
"""

import pytest

from kernels.triton import tuning
from tests.kernels.compile_matrix import Case, cases, compile_case

EACH = [pytest.param(name, case, id=f"{name} {case.name}") for name in ("sm_80", "sm_90", "sm_100") for case in cases(name)]


@pytest.mark.parametrize(("architecture", "case"), EACH)
def test_compiles_without_spills_and_within_shared_memory(architecture: str, case: Case) -> None:
    found = compile_case(case, architecture)
    assert found.stack_bytes == 0
    assert found.shared_bytes <= tuning.SHARED_MEMORY_BYTES[architecture]


@pytest.mark.parametrize("case", [case for case in cases("gfx942") if "block 64" in case.name], ids=lambda case: case.name)
def test_compiles_for_rocm(case: Case) -> None:
    assert compile_case(case, "gfx942").shared_bytes <= tuning.SHARED_MEMORY_BYTES["gfx942"]


def _assembly(kernel: str) -> str:
    case = next(case for case in cases("sm_90") if case.name == f"{kernel} bf16 d128 block 16 group 4")
    return compile_case(case, "sm_90").assembly


def test_prefill_uses_the_warp_group_matrix_unit_on_hopper() -> None:
    assert "wgmma.mma_async" in _assembly("prefill_kernel")


def test_the_prefill_of_hopper_uses_it_from_warp_groups_that_trade_registers() -> None:
    assembly = _assembly("prefill_hopper_kernel")
    assert "wgmma.mma_async" in assembly
    assert "setmaxnreg" in assembly


def test_decode_copies_tiles_asynchronously_in_16_bytes() -> None:
    assembly = _assembly("decode_kernel")
    assert "cp.async.cg.shared.global [ %r" in assembly
    assert ", 0x10" in assembly
