"""How a linear layer keeps its weights and multiplies by them: one `QuantMethod` a weight format.

A method owns the layout of the weights and the fusing of what stands around the product. It knows nothing of models.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, device, dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """An RMSNorm's weight `[H]` and epsilon."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """What stands around a product: an optional norm before it, then bias `[out]`, then SiLU(gate)·up of its two halves.

    `out_dtype`: what the result is given in; None for the input's dtype.
    """

    norm: Norm | None = None
    bias: Tensor | None = None
    silu_mul: bool = False
    out_dtype: dtype | None = None


class QuantMethod(Protocol):
    """A weight format. An implementation fuses the parts of `apply` or composes them; the result is the same up to rounding."""

    name: str

    def create(self, in_features: int, out_features: int, dtype: dtype, on: device) -> dict[str, Tensor]:
        """Uninitialised tensors by their suffix in a checkpoint (`weight`, …), for the whole fused layer."""
        ...

    def targets(self, weights: dict[str, Tensor], start: int, size: int) -> dict[str, Tensor]:
        """Contiguous views, by suffix, that a checkpoint's tensors for outputs [start, start + size) are copied into."""
        ...

    def finish(self, weights: dict[str, Tensor], fusion: Fusion) -> dict[str, Tensor]:
        """The weights in the layout that `apply` takes with this fusion, once all of them are loaded."""
        ...

    def apply(self, x: Tensor, weights: dict[str, Tensor], fusion: Fusion, residual: Tensor | None) -> Tensor:
        """epilogue(norm(x) W^T + bias) + residual. x: [T, in]; out and residual: [T, out], half of `out` after SiLU·mul.

        The residual is the method's to overwrite.
        """
        ...

    def row_dtype(self, weights: dict[str, Tensor]) -> dtype | None:
        """What `apply` rounds each number of x to before it multiplies by finished weights, so that x may as well be given in it; None: to
        nothing."""
        ...

    def best(self, x: Tensor, weights: dict[str, Tensor], fusion: Fusion) -> Tensor:
        """`kernels.reference.greedy` of what `apply` gives of logits: [T] int64."""
        ...
