"""Attention of a CPU in C++: rotary positions, KV write and paged attention of one layer as one call, over a cache of its own layout.

A row's result does not depend, bit for bit, on the other rows of the step, on how its prompt was cut into chunks, on the block size,
or on the number of threads. The operators are there once `kernels.cpu.choose` has loaded them.
"""

from typing import cast

import torch
from torch import Tensor

LANES = 16
MAX_HEAD_DIM = 256
PAGE_BYTES = 2 << 20
CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
SCALE_BYTES = 2
"""Of each head of each token, for its key and for its value, in a cache of int8."""


def refusal(head_dim: int, block_size: int, dtype: torch.dtype) -> str:
    """Why these shapes cannot be computed here; "" when they can."""
    if dtype not in CACHE_DTYPES:
        return f"numbers of {str(dtype).removeprefix('torch.')} (float32, bfloat16 and int8 can be computed)"
    if head_dim % LANES or not 0 < head_dim <= MAX_HEAD_DIM:
        return f"heads of {head_dim} numbers (multiples of {LANES} up to {MAX_HEAD_DIM} can be computed)"
    if block_size % LANES or block_size <= 0:
        return f"blocks of {block_size} tokens (multiples of {LANES} can be computed)"
    return ""


def new_cache(num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys [num_blocks, Hkv, D / pair, block_size, pair] and values [num_blocks, Hkv, block_size / pair, D, pair], zeroed.

    `pair` is 1 for float32 and 2 for others: neighbours along the summed dimension lie side by side. int8: a number is what stands there
    times a bfloat16 scale of its head of its token; two more rows of keys, [block_size, pair] bytes each, are the keys' scales and the
    values'. A block's keys and values are one stretch of memory, which is taken from the system when it is first written. Raises
    `RuntimeError` when it cannot be had.
    """
    pair = 1 if dtype == torch.float32 else 2
    rows = head_dim // pair + (2 if dtype == torch.int8 else 0)
    of_keys, of_values = num_kv_heads * rows * pair * block_size, num_kv_heads * head_dim * block_size
    memory: Tensor = torch.ops.sluice_cpu.zeroed_memory(num_blocks * (of_keys + of_values) * dtype.itemsize)
    both = memory.view(dtype).view(num_blocks, of_keys + of_values)
    keys = both[:, :of_keys].view(num_blocks, num_kv_heads, rows, block_size, pair)
    values = both[:, of_keys:].view(num_blocks, num_kv_heads, block_size // pair, head_dim, pair)
    return keys, values


class CacheMemory:
    """Has the memory of one engine's caches taken from the system shortly before it is written, beside whatever else runs.

    The system takes as long for one page as the engine for a layer, and layers begin their pages together: a step in which they do
    would be several times as long (155 instead of 24 ms; 32 sequences of SmolLM2-135M).
    """

    def __init__(self, caches: list[Tensor]) -> None:
        """Keys or values of each layer, as `new_cache` made them: either stands for both. The first blocks' memory is taken now."""
        self._caches = caches
        self._block_bytes = caches[0].stride(0) * caches[0].itemsize
        self._pages = 0
        self.reach(0)

    def reach(self, block: int) -> None:
        """Block number `block` is written now: memory up to the page behind it is taken, unless it has been."""
        pages = (block + 1) * self._block_bytes // PAGE_BYTES + 2
        if pages > self._pages:
            torch.ops.sluice_cpu.take_ahead.default(self._caches, self._pages * PAGE_BYTES, pages * PAGE_BYTES)
            self._pages = pages


def plan(query_start_loc: Tensor, seq_lens: Tensor, num_q_heads: int, num_kv_heads: int, sliding_window: int) -> Tensor:
    """The step's work for `attend`, cut for the present number of threads. query_start_loc: [S + 1] int32, seq_lens: [S] int32."""
    return cast(
        Tensor,
        torch.ops.sluice_cpu.attention_plan.default(query_start_loc, seq_lens, num_q_heads, num_kv_heads, sliding_window),
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    slot_mapping: Tensor,
    work: Tensor,
    scale: float,
    sliding_window: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`attend` of kernels/reference.py; arithmetic in float32, rounded where k and v are written and at the end.

    q: [T, Hq, D]; k, v: [T, Hkv, D], all in the caches' dtype (int8: in bfloat16) or all in float32, each may be a part of wider rows;
    the caches as `new_cache` made them; `work`: of `plan` for the same sequences, heads and window. out: [T, Hq, D], contiguous, in
    `out_dtype` (None: q's). On a processor with bf16 products, q and the weights of the values are rounded to bf16 too; beside a cache of
    int8 they are whole numbers of 16 bits times a scale a row.
    """
    return cast(
        Tensor,
        torch.ops.sluice_cpu.attention.default(
            q,
            k,
            v,
            cos_sin,
            positions,
            k_cache,
            v_cache,
            block_tables,
            seq_lens,
            query_start_loc,
            slot_mapping,
            work,
            scale,
            sliding_window,
            out_dtype,
        ),
    )
