"""A linear layer made of one or more parts that a checkpoint keeps apart (q, k and v; gate and up), multiplied as one."""

from dataclasses import replace

from torch import Tensor, device, dtype, empty
from torch.nn import Module

from engine.quantization.base import Fusion, Norm, QuantMethod


class Linear(Module):
    """epilogue(norm(x) W^T + bias) + residual, computed by its `QuantMethod`.

    `parts`: output sizes by the name in the checkpoint, in the order in which they stand in the fused output. `shared`: a plain
    weight [out, in] that another layer owns, multiplied by instead of one of its own. `hidden_dtype`: of bias and residual, and of the
    result unless `out_dtype` says otherwise; None for the weights'.
    """

    def __init__(
        self,
        method: QuantMethod,
        in_features: int,
        parts: dict[str, int],
        *,
        dtype: dtype,
        on: device,
        hidden_dtype: dtype | None = None,
        bias: bool = False,
        norm: Norm | None = None,
        silu_mul: bool = False,
        out_dtype: dtype | None = None,
        shared: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._method = method
        self._parts = parts
        out_features = sum(parts.values())
        self.weights = {"weight": shared} if shared is not None else method.create(in_features, out_features, dtype, on)
        hidden_dtype = hidden_dtype or dtype
        own_bias = empty(out_features, dtype=hidden_dtype, device=on) if bias else None
        self.fusion = Fusion(norm=norm, bias=own_bias, silu_mul=silu_mul, out_dtype=out_dtype or hidden_dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [T, in]; out and residual: [T, out], or [T, out / 2] after SiLU·mul. The residual may be overwritten."""
        return self._method.apply(x, self.weights, self.fusion, residual)

    def best(self, x: Tensor) -> Tensor:
        """The first of each row's greatest outputs, -1 as `kernels.reference.greedy` says it. x: [T, in]; out: [T] int64."""
        return self._method.best(x, self.weights, self.fusion)

    def targets(self, prefix: str) -> dict[str, Tensor]:
        """Where each of the checkpoint's tensors goes: contiguous views by full name. An empty prefix adds no dot."""
        stem = f"{prefix}." if prefix else ""
        found: dict[str, Tensor] = {}
        start = 0
        for name, size in self._parts.items():
            views = dict(self._method.targets(self.weights, start, size))
            if self.fusion.bias is not None:
                views["bias"] = self.fusion.bias[start : start + size]
            found |= {f"{stem}{name}.{suffix}": view for suffix, view in views.items()}
            start += size
        return found

    def finish(self) -> None:
        """Puts the loaded weights into the layout of the product; call it once, after loading."""
        self.weights = self._method.finish(self.weights, self.fusion)

    @property
    def row_dtype(self) -> dtype | None:
        """What x is rounded to before the product, once finished: it may as well be given in it. None: to nothing."""
        return self._method.row_dtype(self.weights)

    def give(self, wanted: dtype | None) -> None:
        """Has the result rounded to `wanted`, for a reader that would round it so; None leaves it as it is."""
        if wanted is not None:
            self.fusion = replace(self.fusion, out_dtype=wanted)
