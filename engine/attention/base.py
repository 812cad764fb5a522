"""The seam between a decoder layer and whatever computes attention over the paged KV cache.

An `AttentionMetadata` describes one step's flat batch and is shared by all layers. Chunks of one token stand first
(`num_single_token_chunks` of them); only a backend may look at chunk lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, device, dtype, int8

from kernels.cpu.attention import SCALE_BYTES

Recordable = Literal["nothing", "single tokens", "any step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheSpec:
    """The shape of one layer's cache. `dtype` int8: whole numbers, with a scale of two bytes for each key and value of a head."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: dtype

    @property
    def block_bytes(self) -> int:
        """One block over all layers, keys and values."""
        head_bytes = self.head_dim * self.dtype.itemsize + (SCALE_BYTES if self.dtype == int8 else 0)
        return 2 * self.num_layers * self.block_size * self.num_kv_heads * head_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """One layer's keys and values, as the backend that allocated them lays them; num_blocks is the first dimension of both.

    By torch and Triton: both `[num_blocks, block_size, num_kv_heads, head_dim]` by shape. In C++: `kernels.cpu.attention.new_cache`.
    """

    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """One step's chunks, in plan order.

    query_start_loc: [num_seqs + 1] int32; seq_lens: [num_seqs] int32, context with the chunk; block_tables:
    [num_seqs, max_blocks] int32, padded with 0; slot_mapping: [num_tokens] int64, block_id * block_size + offset,
    -1 = do not write. The `max_*` are host ints, so that no backend has to wait for the device.
    `plan` is whatever the backend's `prepare` made of it, once a step.
    """

    query_start_loc: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    num_single_token_chunks: int
    max_query_len: int
    max_seq_len: int
    plan: Any = None


class AttentionBackend(Protocol):
    """RoPE, KV write and paged attention of one layer, for a flat batch.

    `recordable`: of which steps `prepare` and `forward` use the metadata's tensors alone, and read none of them in Python.
    """

    name: str
    recordable: Recordable

    def allocate(self, spec: KVCacheSpec, num_blocks: int, on: device) -> tuple[LayerCache, ...]:
        """One cache a layer, zeroed."""
        ...

    def will_write(self, block_ids: Sequence[int]) -> None:
        """Hears of blocks that a sequence is given, before a step writes them. Not empty."""
        ...

    def prepare(self, metadata: AttentionMetadata) -> AttentionMetadata:
        """Adds the backend's own per-step work list (`plan`), before the first layer."""
        ...

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
        """q: [T, Hq, D], k and v: [T, Hkv, D], not yet rotated; returns [T, Hq, D] in `out_dtype`, None for q's. Formula:
        kernels/reference.py."""
        ...
