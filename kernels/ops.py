"""The operators' face: which implementation computes what, bound once, by device.

The only place that asks which device there is. Signatures, shapes and formulas stand in `kernels/reference.py`, which is the
implementation wherever there is no better one. A fallback is chosen here by device and by what can be built, once.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels import reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Operators:
    """One implementation of what layers and sampler compute with; each field has the signature of its namesake in
    `kernels/reference.py`. Rotary positions and attention over a cache are the attention backends' to call.

    `reason` says in one sentence why it is this one. `pack_weight`, `linear`, `greedy_linear` and `rounds_rows` (whether a product rounds
    its rows to bfloat16 before it multiplies by this packed weight) go together; None where linears are composed of a library's
    product and the operators around it. `pack_screen`: None where a screen would gain nothing. `attends`:
    `kernels.cpu.attention`, one call for a layer's attention, may be used. `record`: `kernels.cpu.program.record`, None where calls
    cannot be recorded; with it goes `single_tokens`, which makes the flat batch of a step of single tokens (single_tokens.cpp).
    `hidden_dtype`: what `embedding` gives and everything between the products is kept in, None where it is the weights' dtype.
    """

    name: str
    reason: str
    embedding: Callable[[Tensor, Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    float_product: Callable[[Tensor, Tensor], Tensor]
    silu_mul: Callable[[Tensor], Tensor]
    greedy: Callable[[Tensor], Tensor]
    sample: Callable[[Tensor, Tensor, Tensor], Tensor]
    logprobs: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    pack_weight: Callable[[Tensor, str, bool, int], Any] | None = None
    linear: Callable[..., Tensor] | None = None
    rounds_rows: Callable[[Any], bool] | None = None
    greedy_linear: Callable[..., Tensor] | None = None
    pack_screen: Callable[[Any, Tensor | None], Any] | None = None
    attends: bool = False
    hidden_dtype: torch.dtype | None = None
    record: Callable[[Callable[..., Tensor], list[Tensor]], tuple[Tensor, Any]] | None = None
    single_tokens: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, ...]] | None = None


def for_device(device_type: str, cpu_isa: str = "auto", tell: Callable[[str], None] = lambda what: None) -> Operators:
    """The operators for `device.type`: Triton on "cuda" (which is also ROCm's name), C++ on a CPU where it can be built, else torch.

    cpu_isa: "auto", "torch" or an instruction set of `kernels.cpu.NATIVE`; the last one asked for is the one that runs. `tell` hears
    of a build before it starts. Triton and C++ are loaded only when they are bound. Raises `kernels.cpu.BuildError` when a named
    instruction set cannot be had.
    """
    if device_type == "cuda":
        return _triton()
    return _reference() if device_type != "cpu" else _cpu(cpu_isa, tell)


def default_device() -> torch.device:
    """The first CUDA or ROCm device, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@cache
def _reference() -> Operators:
    return Operators(
        name="reference",
        reason="plain torch",
        embedding=reference.embedding,
        rms_norm=reference.rms_norm,
        float_product=reference.float_product,
        silu_mul=reference.silu_mul,
        greedy=reference.greedy,
        sample=reference.sample,
        logprobs=reference.logprobs,
    )


def _cpu(cpu_isa: str, tell: Callable[[str], None]) -> Operators:
    from kernels.cpu import choose

    choice = choose(cpu_isa, tell)
    return (
        _native(choice.instruction_set, choice.reason)
        if choice.instruction_set
        else replace(_reference(), reason=choice.reason)
    )


@cache
def _native(instruction_set: str, reason: str) -> Operators:
    from kernels.cpu.program import record

    native = torch.ops.sluice_cpu
    return replace(
        _reference(),
        name=f"cpu_{instruction_set}",
        reason=reason,
        embedding=native.embedding.default,
        rms_norm=native.rms_norm.default,
        pack_weight=native.pack.default,
        linear=native.linear.default,
        rounds_rows=native.rounds_rows.default,
        greedy_linear=native.greedy_linear.default,
        pack_screen=native.pack_screen.default if native.screens.default() else None,
        greedy=native.greedy.default,
        sample=native.sample.default,
        logprobs=native.logprobs.default,
        attends=True,
        # Rows are few and stay in the caches: rounding them to bfloat16 between two operators would save nothing.
        hidden_dtype=torch.float32,
        record=record,
        single_tokens=native.single_tokens.default,
    )


def _float_product(x: Tensor, weight: Tensor) -> Tensor:
    # CUDA's library sums in float32: what it gives need not be rounded and widened again. (The interpreter's tensors are on a CPU.)
    if x.dtype == torch.float32 or not x.is_cuda or torch.version.hip:
        return reference.float_product(x, weight)
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


@cache
def _triton() -> Operators:
    from kernels.triton import rms_norm, sampling, silu_mul

    return Operators(
        name="triton",
        reason="Triton kernels for the GPU",
        embedding=reference.embedding,
        rms_norm=rms_norm.rms_norm,
        float_product=_float_product,
        silu_mul=silu_mul.silu_mul,
        greedy=sampling.greedy,
        sample=sampling.sample,
        logprobs=reference.logprobs,
    )
