"""Plain weights `[out, in]` in the model's dtype; torch's own product, the operators of `kernels` around it."""

import torch
from torch import Tensor, device, dtype
from torch.nn import functional

from engine.quantization.base import Fusion
from kernels.ops import Operators


class Unquantized:
    """Composes norm, product and epilogue. A residual rides in the product where nothing stands between, and is rounded once."""

    name = "unquantized"

    def __init__(self, ops: Operators) -> None:
        self._ops = ops

    def create(self, in_features: int, out_features: int, dtype: dtype, on: device) -> dict[str, Tensor]:
        return {"weight": torch.empty(out_features, in_features, dtype=dtype, device=on)}

    def targets(self, weights: dict[str, Tensor], start: int, size: int) -> dict[str, Tensor]:
        return {"weight": weights["weight"][start : start + size]}

    def finish(self, weights: dict[str, Tensor], fusion: Fusion) -> dict[str, Tensor]:
        return weights

    def apply(self, x: Tensor, weights: dict[str, Tensor], fusion: Fusion, residual: Tensor | None) -> Tensor:
        weight = weights["weight"]
        if fusion.norm is not None:
            x = self._ops.rms_norm(x, fusion.norm.weight, fusion.norm.eps)
        plain = fusion.bias is None and not fusion.silu_mul
        wanted = fusion.out_dtype or x.dtype
        if plain and residual is not None and wanted == x.dtype:
            # In place: out of place, torch copies the residual first.
            return residual.addmm_(x, weight.t())
        if plain and residual is None and wanted == torch.float32:
            return self._ops.float_product(x, weight)
        out = functional.linear(x, weight, fusion.bias)
        if fusion.silu_mul:
            out = self._ops.silu_mul(out)
        if residual is not None:
            out = out + residual
        return out.to(wanted)

    def row_dtype(self, weights: dict[str, Tensor]) -> dtype | None:
        return None

    def best(self, x: Tensor, weights: dict[str, Tensor], fusion: Fusion) -> Tensor:
        return self._ops.greedy(self.apply(x, weights, fusion, None))
