"""The operators' face: which implementation computes what, bound once, by device.

The only place that asks which device there is. Signatures, shapes and formulas stand in `kernels/reference.py`, which is the
implementation wherever there is no better one. A fallback is chosen here by device, never by catching an exception.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels import reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Operators:
    """One implementation of every operator; each field has the signature of its namesake in `kernels/reference.py`."""

    name: str
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    silu_mul: Callable[[Tensor], Tensor]
    rotary_kv_write: Callable[..., Tensor]
    paged_attention: Callable[..., Tensor]
    greedy: Callable[[Tensor], Tensor]
    sample: Callable[[Tensor, Tensor, Tensor], Tensor]
    logprobs: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


@cache
def for_device(device_type: str) -> Operators:
    """The operators for `device.type`: Triton on "cuda" (which is also ROCm's name), plain torch elsewhere.

    Triton is imported only when it is bound: a CPU-only process never loads it.
    """
    return _triton() if device_type == "cuda" else _reference()


def default_device() -> torch.device:
    """The first CUDA or ROCm device, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _reference() -> Operators:
    return Operators(
        name="reference",
        rms_norm=reference.rms_norm,
        add_rms_norm=reference.add_rms_norm,
        silu_mul=reference.silu_mul,
        rotary_kv_write=reference.rotary_kv_write,
        paged_attention=reference.paged_attention,
        greedy=reference.greedy,
        sample=reference.sample,
        logprobs=reference.logprobs,
    )


def _triton() -> Operators:
    from kernels.triton import paged_attention, rms_norm, rotary_kv_write, silu_mul

    return Operators(
        name="triton",
        rms_norm=rms_norm.rms_norm,
        add_rms_norm=rms_norm.add_rms_norm,
        silu_mul=silu_mul.silu_mul,
        rotary_kv_write=rotary_kv_write.rotary_kv_write,
        paged_attention=paged_attention.paged_attention,
        greedy=reference.greedy,
        sample=reference.sample,
        logprobs=reference.logprobs,
    )
