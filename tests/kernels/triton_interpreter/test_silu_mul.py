"""Triton's SiLU·mul, interpreted, against the reference."""

import pytest
import torch

from kernels import reference
from kernels.triton.silu_mul import silu_mul
from tests.kernels.tolerance import assert_as_exact_as_torch


@pytest.fixture(autouse=True)
def _nan_filled(nan_filled_results: None) -> None:
    """Results start as NaN: an element that the kernel forgets shows."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (1, 63), (63, 100), (2, 1536)])
def test_gate(num_rows: int, width: int, dtype: torch.dtype) -> None:
    x = (4 * torch.randn(num_rows, 2 * width)).to(dtype)
    assert_as_exact_as_torch(silu_mul(x), reference.silu_mul(x), reference.silu_mul(x.float()))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy's, whose infinity is meant
def test_large_gates_saturate_instead_of_becoming_nan() -> None:
    gate, up = torch.tensor([[-200.0, -88.0, 0.0, 88.0, 200.0]]), torch.full((1, 5), 2.0)
    torch.testing.assert_close(silu_mul(torch.cat((gate, up), -1)), torch.tensor([[0.0, 0.0, 0.0, 176.0, 400.0]]))


def test_rows_may_be_strided() -> None:
    wide = torch.randn(3, 256)
    assert torch.equal(silu_mul(wide[:, :126]), silu_mul(wide[:, :126].contiguous()))


def test_no_rows_give_no_rows() -> None:
    assert silu_mul(torch.empty(0, 64)).shape == (0, 32)


def test_elements_that_are_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        silu_mul(torch.randn(64, 8).T)
