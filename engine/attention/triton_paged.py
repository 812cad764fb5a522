"""Attention by the Triton kernels: one cache layout, one plan a step, no wait for the device.

Each (block, KV head) holds its keys and its values as two contiguous runs, so that a tile of either is one stretch of
memory. Knows caches and lengths; arithmetic and tile sizes are the kernels'.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, device

from engine.attention.base import AttentionMetadata, KVCacheSpec, LayerCache, Recordable
from kernels.triton.paged_attention import attend
from kernels.triton.paged_plan import PagedPlan
from kernels.triton.rotary_kv_write import rotary_kv_write


class TritonPagedAttention:
    """Implements `engine.attention.base.AttentionBackend` on CUDA and ROCm (and on a CPU in Triton's interpreter).

    Guarantees that a row's result does not depend, bit for bit, on the other sequences of the batch: decodes always take
    the split kernel, longer chunks always the prefill kernel. Between those two the last bits may differ.
    """

    name = "triton_paged"
    recordable: Recordable = "single tokens"

    def allocate(self, spec: KVCacheSpec, num_blocks: int, on: device) -> tuple[LayerCache, ...]:
        """One cache a layer, zeroed: storage [num_blocks, Hkv, K and V, block_size, D] seen as the border's shape."""
        storage = (num_blocks, spec.num_kv_heads, 2, spec.block_size, spec.head_dim)
        caches = []
        for _ in range(spec.num_layers):
            both = torch.zeros(storage, dtype=spec.dtype, device=on).permute(2, 0, 3, 1, 4)
            caches.append(LayerCache(k=both[0], v=both[1]))
        return tuple(caches)

    def will_write(self, block_ids: Sequence[int]) -> None:
        """All of the memory is there."""

    def prepare(self, metadata: AttentionMetadata) -> AttentionMetadata:
        """Adds the step's `PagedPlan`; its work lists are made on the device when the first layer needs them."""
        plan = PagedPlan(
            seq_lens=metadata.seq_lens,
            query_start_loc=metadata.query_start_loc,
            block_tables=metadata.block_tables,
            num_decodes=metadata.num_single_token_chunks,
            num_tokens=metadata.slot_mapping.shape[0],
            max_seq_len=metadata.max_seq_len,
        )
        return replace(metadata, plan=plan)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos_sin: Tensor,
        positions: Tensor,
        cache: LayerCache,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """q: [T, Hq, D], k and v: [T, Hkv, D], not yet rotated; returns [T, Hq, D], contiguous."""
        rotated = rotary_kv_write(q, k, v, cos_sin, positions, cache.k, cache.v, metadata.slot_mapping)
        return attend(rotated, cache.k, cache.v, metadata.plan, scale, sliding_window).to(out_dtype or q.dtype)
