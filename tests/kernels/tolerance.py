"""The house's rule for numbers: an error against float32 at most twice that of plain torch in the working type, and a little."""

import torch
from torch import Tensor

LITTLE = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Relative to 1 + the value: about a rounding, for where plain torch happens to be exact; in float32 a few, for the order of sums."""


def assert_as_exact_as_torch(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """`actual` is finite, in `plain`'s type and shape, and at most twice as far from `exact` (float32) as `plain` is."""
    assert actual.dtype == plain.dtype
    assert actual.shape == plain.shape == exact.shape
    assert torch.isfinite(actual).all()
    if actual.numel() == 0:
        return
    size = 1 + exact.abs()
    error = ((actual.float() - exact).abs() / size).max().item()
    allowed = 2 * ((plain.float() - exact).abs() / size).max().item() + LITTLE[actual.dtype]
    assert error <= allowed, f"error {error:.3e} is above {allowed:.3e}"
