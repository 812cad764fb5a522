"""Weights packed a second time in 12 bits: products of few rows read them, and not a bit is another."""

import pytest
import torch
from torch import Tensor

from tests.kernels.native import native
from tests.kernels.test_cpu_linear import EPS, make_case

__all__ = ["native"]


def packed_twice(native: object, weight: Tensor, gated: bool = False) -> tuple[Tensor, Tensor]:
    """Without a narrow copy, and with one where it can be had."""
    return native.pack(weight, "bfloat16", gated, 0), native.pack(weight, "bfloat16", gated, 0, True)  # type: ignore[attr-defined]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("out", "inputs"), [(1, 1), (48, 8), (50, 100), (300, 576), (96, 1544), (130, 4864)])
def test_a_narrow_copy_changes_no_bit(native, out, inputs, gated):
    case = make_case(19, 2 * out if gated else out, inputs, around=5, gated=gated).to(torch.bfloat16)
    plain, narrow = packed_twice(native, case.weight, gated)
    assert (narrow.numel() > plain.numel()) == (native.narrow_rows() > 0)
    for rows in range(1, 20):
        x, residual = case.x[:rows], case.residual[:rows]
        given = [native.linear(x, packed, case.norm_weight, EPS, None, residual, torch.float32) for packed in (plain, narrow)]
        assert torch.equal(*given), rows
        if not gated:
            assert torch.equal(*[native.greedy_linear(x, packed, None, case.norm_weight, EPS) for packed in (plain, narrow)])


def test_a_narrow_copy_holds_numbers_of_every_size(native):
    # What dwarfs the others takes the greatest numbers of fixed point; of both signs, with all that lies below.
    weight = torch.randn(96, 512, generator=torch.Generator().manual_seed(3)).bfloat16()
    factors = torch.tensor([1.0, -1.0, 3.0, -7.0, 15.9, -31.0, 63.0, -63.0]).repeat(12)
    weight[torch.arange(96), torch.arange(96) * 5] = factors.bfloat16()
    x = torch.randn(8, 512).bfloat16()
    plain, narrow = packed_twice(native, weight)
    assert (narrow.numel() > plain.numel()) == (native.narrow_rows() > 0)
    given = [native.linear(x, packed, None, 0.0, None, None, torch.float32) for packed in (plain, narrow)]
    assert torch.equal(*given)
    torch.testing.assert_close(given[1], x.float() @ weight.float().T, atol=0.15, rtol=0.01)


def test_weights_of_more_bits_have_no_narrow_copy(native):
    # Kept as bfloat16, of float32: fixed point holds more of their bits than a narrow copy could.
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(4))
    x = torch.randn(3, 64)
    plain, narrow = packed_twice(native, weight)
    assert torch.equal(plain, narrow)
    assert torch.equal(*[native.linear(x, packed, None, 0.0, None, None, None) for packed in (plain, narrow)])


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_narrow_copy_holds_outputs_of_zeros_and_of_what_is_no_number(native, value):
    weight = torch.randn(60, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    weight[7] = value
    x = torch.randn(2, 64).bfloat16()
    given = [native.linear(x, packed, None, 0.0, None, None, torch.float32) for packed in packed_twice(native, weight)]
    torch.testing.assert_close(given[1], given[0], atol=0.0, rtol=0.0, equal_nan=True)
    assert (given[1][:, 7] == 0.0).all() if value == 0.0 else given[1][:, 7].isnan().all()
