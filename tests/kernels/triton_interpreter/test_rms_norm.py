"""Triton's RMSNorm, interpreted, against the reference."""

import pytest
import torch

from kernels import reference
from kernels.triton import rms_norm as kernels
from tests.kernels.tolerance import assert_as_exact_as_torch

DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _nan_filled(nan_filled_results: None) -> None:
    """Results start as NaN: an element that a kernel forgets shows."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (1, 64), (63, 100), (3, 576), (5, 1025)])
def test_norm(num_rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(num_rows, width).to(dtype), torch.randn(width).to(dtype)
    assert_as_exact_as_torch(
        kernels.rms_norm(x, weight, 1e-5),
        reference.rms_norm(x, weight, 1e-5),
        reference.rms_norm(x.float(), weight.float(), 1e-5),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 63), (100, 64), (3, 576)])
def test_residual_is_added_and_returned(num_rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(num_rows, width).to(dtype), torch.randn(num_rows, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    before = x.clone(), residual.clone()
    normed, total = kernels.add_rms_norm(x, residual, weight, 1e-5)
    plain, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    assert_as_exact_as_torch(normed, plain, reference.rms_norm(expected_total.float(), weight.float(), 1e-5))
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_rows_may_be_strided() -> None:
    wide, weight = torch.randn(7, 200), torch.randn(100)
    actual = kernels.rms_norm(wide[:, :100], weight, 1e-5)
    assert torch.equal(actual, kernels.rms_norm(wide[:, :100].contiguous(), weight, 1e-5))


def test_row_does_not_depend_on_its_batch_mates() -> None:
    x, weight = torch.randn(100, 100), torch.randn(100)
    batch = kernels.rms_norm(x, weight, 1e-5)
    assert torch.equal(batch[63:64], kernels.rms_norm(x[63:64], weight, 1e-5))


def test_no_rows_give_no_rows() -> None:
    assert kernels.rms_norm(torch.empty(0, 64), torch.ones(64), 1e-5).shape == (0, 64)


def test_elements_that_are_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        kernels.rms_norm(torch.randn(64, 8).T, torch.ones(64), 1e-5)


def test_a_row_that_no_program_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="40000 elements"):
        kernels.rms_norm(torch.ones(1, 40000), torch.ones(40000), 1e-5)
