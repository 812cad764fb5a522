"""Weights packed for the operators that fuse a whole linear layer: plain, INT8 and INT4, made on load from plain weights.

A checkpoint's tensors are read into a plain `[out, in]` weight; `finish` packs it and lets it go.
"""

from torch import Tensor, bfloat16, device, dtype, empty

from engine.quantization.base import Fusion
from kernels.ops import Operators

GROUP = 32
"""Inputs that share a scale in INT4: the finest of the usual ones, 0.5 bits a weight."""


class Packed:
    """One call a layer: norm, product, bias, SiLU·mul and residual. `format` "" is the weight's own dtype."""

    format = ""
    name = "packed"

    def __init__(self, ops: Operators) -> None:
        if ops.pack_weight is None or ops.linear is None or ops.greedy_linear is None or ops.rounds_rows is None:
            raise ValueError(f"the operators {ops.name!r} have no packed linears")
        self._pack, self._linear, self._greedy_linear = ops.pack_weight, ops.linear, ops.greedy_linear
        self._rounds_rows = ops.rounds_rows

    def create(self, in_features: int, out_features: int, dtype: dtype, on: device) -> dict[str, Tensor]:
        return {"weight": empty(out_features, in_features, dtype=dtype, device=on)}

    def targets(self, weights: dict[str, Tensor], start: int, size: int) -> dict[str, Tensor]:
        return {"weight": weights["weight"][start : start + size]}

    def finish(self, weights: dict[str, Tensor], fusion: Fusion) -> dict[str, Tensor]:
        weight = weights["weight"]
        stored_as = self.format or str(weight.dtype).removeprefix("torch.")
        return {"packed": self._pack(weight, stored_as, fusion.silu_mul, GROUP)}

    def apply(self, x: Tensor, weights: dict[str, Tensor], fusion: Fusion, residual: Tensor | None) -> Tensor:
        norm = fusion.norm
        if norm is None:
            return self._linear(x, weights["packed"], None, 0.0, fusion.bias, residual, fusion.out_dtype)
        return self._linear(x, weights["packed"], norm.weight, norm.eps, fusion.bias, residual, fusion.out_dtype)

    def row_dtype(self, weights: dict[str, Tensor]) -> dtype | None:
        return bfloat16 if self._rounds_rows(weights["packed"]) else None

    def best(self, x: Tensor, weights: dict[str, Tensor], fusion: Fusion) -> Tensor:
        norm = fusion.norm
        if norm is None:
            return self._greedy_linear(x, weights["packed"], weights.get("screen"), None, 0.0)
        return self._greedy_linear(x, weights["packed"], weights.get("screen"), norm.weight, norm.eps)


class Screened(Packed):
    """With a second copy in 8 bits, from which `best` finds the few outputs that it computes."""

    name = "screened"

    def __init__(self, ops: Operators) -> None:
        super().__init__(ops)
        if ops.pack_screen is None:
            raise ValueError(f"the operators {ops.name!r} have no screens")
        self._pack_screen = ops.pack_screen

    def finish(self, weights: dict[str, Tensor], fusion: Fusion) -> dict[str, Tensor]:
        finished = super().finish(weights, fusion)
        norm_weight = fusion.norm.weight if fusion.norm is not None else None
        return finished | {"screen": self._pack_screen(finished["packed"], norm_weight)}


class Int8(Packed):
    """One scale an output; rows are quantised as they come, one scale each."""

    format = "int8"
    name = "int8"


class Int4(Packed):
    """A float16 scale for every `GROUP` inputs of an output; rows as in `Int8`."""

    format = "int4"
    name = "int4"
