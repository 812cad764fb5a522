"""Attention by the C++ operators of a CPU: one call a layer, its work cut once a step.

Knows caches and lengths; arithmetic and layout are `kernels.cpu.attention`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, device, dtype

from engine.attention.base import AttentionMetadata, KVCacheSpec, LayerCache, Recordable
from kernels.cpu import attention


@dataclass(slots=True, kw_only=True)
class Plan:
    """One step's work by (query heads, KV heads, window); filled as the first layer of each kind asks."""

    work: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)


class CpuPagedAttention:
    """Implements `engine.attention.base.AttentionBackend` where the C++ operators are loaded and take the shapes.

    A row's result does not depend, bit for bit, on its batch mates, on the prompt's chunks or on the number of threads.
    """

    name = "cpu_paged"
    recordable: Recordable = "any step"

    def __init__(self) -> None:
        self._memory: attention.CacheMemory | None = None

    def allocate(self, spec: KVCacheSpec, num_blocks: int, on: device) -> tuple[LayerCache, ...]:
        """One cache a layer, zeroed; `on` is the CPU."""
        shape = (num_blocks, spec.num_kv_heads, spec.head_dim, spec.block_size, spec.dtype)
        pairs = [attention.new_cache(*shape) for _ in range(spec.num_layers)]
        self._memory = attention.CacheMemory([k for k, _ in pairs])
        return tuple(LayerCache(k=k, v=v) for k, v in pairs)

    def will_write(self, block_ids: Sequence[int]) -> None:
        """Has their memory, and what comes behind it, taken from the system."""
        if self._memory is not None:
            self._memory.reach(max(block_ids))

    def prepare(self, metadata: AttentionMetadata) -> AttentionMetadata:
        """Adds an empty `Plan`: heads and window are the layers' to say."""
        return replace(metadata, plan=Plan())

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
        out_dtype: dtype | None = None,
    ) -> Tensor:
        """q: [T, Hq, D], k and v: [T, Hkv, D], not yet rotated; returns [T, Hq, D]. Formula: kernels/reference.py."""
        plan: Plan = metadata.plan
        kind = (q.shape[1], k.shape[1], sliding_window)
        work = plan.work.get(kind)
        if work is None:
            work = plan.work[kind] = attention.plan(metadata.query_start_loc, metadata.seq_lens, *kind)
        return attention.attend(
            q,
            k,
            v,
            cos_sin,
            positions,
            cache.k,
            cache.v,
            metadata.block_tables,
            metadata.seq_lens,
            metadata.query_start_loc,
            metadata.slot_mapping,
            work,
            scale,
            sliding_window,
            out_dtype,
        )
