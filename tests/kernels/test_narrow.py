"""Weights in fixed point in 12 bits: not a bit of a product is another than with their 16 bits, whatever the number of rows."""

import pytest
import torch
from torch import Tensor

from tests.kernels.native import native
from tests.kernels.test_cpu_linear import EPS, make_case

__all__ = ["native"]


@pytest.fixture
def both_ways(native):
    """pack(weight, gated), in 12 bits where the instruction set has them, and in 16, for the sake of one more output of each half, whose
    numbers have more bits."""

    def pack(weight: Tensor, gated: bool = False) -> tuple[Tensor, Tensor]:
        more = torch.rand(1, weight.shape[1], generator=torch.Generator().manual_seed(1))
        halves = weight.float().chunk(2 if gated else 1)
        wide = torch.cat([torch.cat((half, more)) for half in halves])
        return native.pack(weight, "bfloat16", gated, 0), native.pack(wide, "bfloat16", gated, 0)

    return pack


def assert_equal(
    native: object, both: tuple[Tensor, Tensor], x: Tensor, norm_weight: Tensor | None, residual: Tensor
) -> Tensor:
    """The outputs, which are the same of both, NaN too."""
    packed, wide = both
    more = torch.cat((residual, residual[:, :1]), dim=1)
    given = native.linear(x, packed, norm_weight, EPS, None, residual, torch.float32)  # type: ignore[attr-defined]
    wanted = native.linear(x, wide, norm_weight, EPS, None, more, torch.float32)[:, :-1]  # type: ignore[attr-defined]
    torch.testing.assert_close(given, wanted, atol=0.0, rtol=0.0, equal_nan=True)
    return given


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("out", "inputs"), [(1, 1), (48, 8), (50, 100), (288, 576), (96, 1544), (130, 4864)])
def test_not_a_bit_is_another(native, both_ways, out, inputs, gated):
    case = make_case(50, 2 * out if gated else out, inputs, around=5, gated=gated).to(torch.bfloat16)
    both = both_ways(case.weight, gated)
    for rows in (*range(1, 20), 33, 50):
        assert_equal(native, both, case.x[:rows], case.norm_weight, case.residual[:rows])


def test_numbers_of_every_size(native, both_ways, request):
    # What dwarfs the others takes the greatest numbers of fixed point; of both signs, with all that lies below.
    weight = torch.randn(96, 512, generator=torch.Generator().manual_seed(3)).bfloat16()
    factors = torch.tensor([1.0, -1.0, 3.0, -7.0, 15.9, -31.0, 63.0, -63.0]).repeat(12)
    weight[torch.arange(96), torch.arange(96) * 5] = factors.bfloat16()
    both = both_ways(weight)
    wide_bytes = native.pack(torch.rand(96, 512), "bfloat16", False, 0).numel()
    assert (both[0].numel() < 0.8 * wide_bytes) == (request.node.callspec.params["native"] == "avx512_vnni")
    for rows in (8, 24):
        x = torch.randn(rows, 512).bfloat16()
        given = assert_equal(native, both, x, None, torch.zeros(rows, 96))
        torch.testing.assert_close(given, x.float() @ weight.float().T, atol=0.15, rtol=0.01)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_outputs_of_zeros_and_of_what_is_no_number(native, both_ways, value):
    weight = torch.randn(60, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    weight[7] = value
    for rows in (2, 20):
        given = assert_equal(native, both_ways(weight), torch.randn(rows, 64).bfloat16(), None, torch.zeros(rows, 60))
        assert (given[:, 7] == 0.0).all() if value == 0.0 else given[:, 7].isnan().all()
