"""The weights of an RMSNorm; the norm itself is computed by whatever it stands before."""

from torch import Tensor, device, dtype, empty

from engine.quantization.base import Norm


def make_norm(size: int, eps: float, *, dtype: dtype, on: device) -> Norm:
    """An RMSNorm over `size` features, its weight uninitialised."""
    return Norm(weight=empty(size, dtype=dtype, device=on), eps=eps)


def norm_targets(norm: Norm, name: str) -> dict[str, Tensor]:
    """Where the checkpoint's tensor `<name>.weight` goes."""
    return {f"{name}.weight": norm.weight}
