"""Causal attention of a mixed batch over a paged KV cache: decodes by the split kernel, longer chunks by the prefill kernel.

Twin of `kernels.reference.paged_attention`. A decode row always takes the split kernel, whatever else the batch holds,
and every row's result is bit for bit independent of the other sequences. `attend` is what a backend calls, a layer
at a time, with one `PagedPlan` a step; `paged_attention` makes the plan itself and therefore waits for the device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import tuning
from kernels.triton.paged_decode import decode_kernel, merge_kernel
from kernels.triton.paged_plan import PagedPlan
from kernels.triton.paged_prefill import prefill_kernel

_DOT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
if tuning.INTERPRETING:
    # The interpreter multiplies bfloat16 wrongly, without a word.
    _DOT[torch.bfloat16] = tl.float32


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: PagedPlan, scale: float, sliding_window: int = 0) -> Tensor:
    """One layer's attention. Shapes as in `paged_attention`; never waits for the device.

    q's heads and tokens may be strided. Raises ValueError for a type other than float32, float16 and bfloat16, elements
    of a head that are not contiguous, caches of different strides, a scale that is not above 0, or a head size above 256.
    """
    if q.dtype not in _DOT:
        raise ValueError(f"attention takes float32, float16 and bfloat16, not {q.dtype}")
    if q.stride(-1) != 1 or k_cache.stride(-1) != 1 or k_cache.stride() != v_cache.stride():
        raise ValueError("attention wants contiguous elements of a head, and K and V caches of equal strides")
    if not scale > 0:
        raise ValueError(f"the attention scale must be above 0, not {scale}")
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    group = q.shape[1] // num_kv_heads
    padded = max(16, triton.next_power_of_2(head_dim))
    shapes = tuning.attention(tuning.architecture(q.device), padded, q.element_size())
    common = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "D": head_dim,
        "D_PAD": padded,
        "WINDOW": sliding_window,
        "BLOCK_SIZE": block_size,
        "DOT": _DOT[q.dtype],
    }
    strides = (*q.stride()[:2], *k_cache.stride()[:3], plan.block_tables.stride(0))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if plan.num_decodes:
        _decode(out, q, k_cache, v_cache, plan, scale * math.log2(math.e), sliding_window, strides, shapes.decode, common)
    if plan.num_prefill_tokens > 0:
        on_hopper = not sliding_window and _hopper_takes(q, k_cache, v_cache)
        launch = _hopper_launch(q, common) if on_hopper else _prefill_launch(q, shapes.prefill, common)
        _prefill(out, q, k_cache, v_cache, plan, scale * math.log2(math.e), strides, launch)
    return out


def _hopper_takes(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether `paged_prefill_hopper` can: Hopper, 16 bits, its head sizes, and what `cp.async` can reach."""
    num_heads, head_dim = q.shape[1:]
    if tuning.INTERPRETING or tuning.architecture(q.device) != "sm_90" or q.element_size() != 2:
        return False
    # It moves 16 bytes at a time, and counts them in 31 bits from the cache's start.
    aligned = not any(stride % 16 for stride in k_cache.stride()[:3])
    aligned &= not any(cache.data_ptr() % 16 for cache in (k_cache, v_cache))
    reachable = k_cache.shape[0] * k_cache.stride(0) < 1 << 34
    return aligned and reachable and head_dim in tuning.HOPPER_PREFILL_HEAD_DIMS and num_heads // k_cache.shape[2] <= 128


def _decode(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: PagedPlan,
    qk_scale: float,
    window: int,
    strides: tuple[int, ...],
    shape: tuning.Tile,
    common: dict,
) -> None:
    work = plan.decode_list(window)
    num_heads, head_dim = q.shape[1], q.shape[2]
    several = plan.max_splits(window) > 1
    partial, maxima, sums = plan.scratch(work.capacity if several else 0, num_heads, head_dim)
    programs = min(tuning.persistent_programs(q.device), work.capacity * common["NUM_KV_HEADS"])
    decode_kernel[(programs,)](
        out,
        partial,
        maxima,
        sums,
        q,
        k_cache,
        v_cache,
        plan.block_tables,
        plan.seq_lens,
        work.starts,
        work.owners,
        plan.num_decodes,
        qk_scale,
        *strides,
        **common,
        BLOCK_M=max(shape.block_m, triton.next_power_of_2(common["GROUP"])),
        TILE=shape.tile,
        SPLIT=tuning.SPLIT_TOKENS,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        **tuning.layer_options(q.device),
    )
    if several:
        merge_kernel[(plan.num_decodes, num_heads)](
            out,
            partial,
            maxima,
            sums,
            work.starts,
            NUM_Q_HEADS=num_heads,
            D=head_dim,
            D_PAD=common["D_PAD"],
            SPLITS=tuning.MERGE_SPLITS,
            num_warps=tuning.MERGE_WARPS,
            **tuning.layer_options(q.device),
        )


@dataclass(frozen=True, slots=True)
class _Launch:
    """A prefill kernel: rows of a program, its grid from the work list's capacity, and what it is compiled for."""

    kernel: Any
    block_m: int
    grid: Callable[[int], tuple[int, ...]]
    settings: dict[str, Any]


def _prefill_launch(q: Tensor, shape: tuning.Tile, common: dict[str, Any]) -> _Launch:
    block_m = max(shape.block_m, triton.next_power_of_2(common["GROUP"]))
    settings = {"BLOCK_M": block_m, "TILE": shape.tile, "num_warps": shape.num_warps, "num_stages": shape.num_stages}
    heads = common["NUM_KV_HEADS"]
    return _Launch(
        prefill_kernel, block_m, lambda capacity: (capacity, heads), common | settings | tuning.layer_options(q.device)
    )


def _hopper_launch(q: Tensor, common: dict[str, Any]) -> _Launch:
    # Imported where it runs: Gluon is an experimental part of Triton.
    from kernels.triton.paged_prefill_hopper import BLOCK_M, LAUNCH, prefill_hopper_kernel

    shape = {name: common[name] for name in ("NUM_KV_HEADS", "GROUP", "D", "BLOCK_SIZE")}
    shape |= {"TILE": tuning.HOPPER_PREFILL_TILE, "STAGES": tuning.HOPPER_PREFILL_STAGES}
    heads = common["NUM_KV_HEADS"]
    return _Launch(
        prefill_hopper_kernel, BLOCK_M, lambda capacity: (capacity * heads,), shape | LAUNCH | tuning.COMPILER_OPTIONS
    )


def _prefill(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: PagedPlan,
    qk_scale: float,
    strides: tuple[int, ...],
    launch: _Launch,
) -> None:
    work = plan.prefill_list(launch.block_m // (q.shape[1] // k_cache.shape[2]))
    launch.kernel[launch.grid(work.capacity)](
        out,
        q,
        k_cache,
        v_cache,
        plan.block_tables,
        plan.seq_lens,
        plan.query_start_loc,
        work.starts,
        work.owners,
        plan.num_prefills,
        plan.num_decodes,
        qk_scale,
        *strides,
        **launch.settings,
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    sliding_window: int = 0,
) -> Tensor:
    """Causal attention of each sequence's chunk over its whole paged context; reads the lengths back, so it waits for the device.

    q: [T, Hq, D]; caches: [num_blocks, block_size, Hkv, D], any strides but the last; block_tables: [S, max_blocks] int32,
    padded; seq_lens: [S] int32; query_start_loc: [S + 1] int32. out: [T, Hq, D], contiguous. Raises as `attend`.
    """
    starts = query_start_loc.tolist()
    num_decodes = 0
    while num_decodes < len(starts) - 1 and starts[num_decodes + 1] - starts[num_decodes] == 1:
        num_decodes += 1
    plan = PagedPlan(
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
        block_tables=block_tables,
        num_decodes=num_decodes,
        num_tokens=q.shape[0],
        max_seq_len=int(seq_lens.max()) if seq_lens.numel() else 0,
    )
    return attend(q, k_cache, v_cache, plan, scale, sliding_window)
