"""Paged attention in plain torch: gathers keys and values by slot, then torch's own scaled dot product.

Chunks of one token are computed together, padded to the longest of their group; longer chunks one sequence at a time. All index
tensors of a step are made once, in `prepare`, and shared by the layers. Padding reads a slot that the sequence itself has written,
so nothing that an unwritten or stale slot holds can reach a result.

Knows nothing of devices, and waits for the host lengths in `prepare`: the backend of the CPU, the fallback elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, device
from torch.nn.functional import scaled_dot_product_attention

from engine.attention.base import AttentionMetadata, KVCacheSpec, LayerCache, Recordable
from engine.attention.torch_plan import Group, Long, make_groups, make_longs


@dataclass(slots=True, kw_only=True)
class Plan:
    """One step's index tensors. `rows` is None when every token is written; the caches fill as layers ask."""

    rows: Tensor | None
    slots: Tensor
    block_tables: Tensor
    seq_lens: list[int]
    starts: list[int]
    num_singles: int
    rotary: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)
    work: dict[int, tuple[list[Group], list[Long]]] = field(default_factory=dict)


class TorchPagedAttention:
    """The `AttentionBackend` of torch. A layer's keys and values of a slot lie side by side: one gather reads both."""

    name = "torch_paged"
    recordable: Recordable = "nothing"

    def allocate(self, spec: KVCacheSpec, num_blocks: int, on: device) -> tuple[LayerCache, ...]:
        """One cache a layer, zeroed: views of [num_blocks, block_size, 2, num_kv_heads, head_dim]."""
        shape = (num_blocks, spec.block_size, 2, spec.num_kv_heads, spec.head_dim)
        pairs = [torch.zeros(shape, dtype=spec.dtype, device=on) for _ in range(spec.num_layers)]
        return tuple(LayerCache(k=pair[:, :, 0], v=pair[:, :, 1]) for pair in pairs)

    def will_write(self, block_ids: Sequence[int]) -> None:
        """All of the memory is there."""

    def prepare(self, metadata: AttentionMetadata) -> AttentionMetadata:
        """Reads the lengths once; the index tensors follow when the first layer names its block size and window."""
        written = metadata.slot_mapping >= 0
        rows = None if bool(written.all()) else written.nonzero().squeeze(1)
        plan = Plan(
            rows=rows,
            slots=metadata.slot_mapping if rows is None else metadata.slot_mapping[rows],
            block_tables=metadata.block_tables.long(),
            seq_lens=metadata.seq_lens.tolist(),
            starts=metadata.query_start_loc.tolist(),
            num_singles=metadata.num_single_token_chunks,
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
        """q: [T, Hq, D], k and v: [T, Hkv, D], not yet rotated; returns [T, Hq, D]. Formula: kernels/reference.py."""
        plan: Plan = metadata.plan
        kept = cache.k.dtype
        if q.dtype != kept:  # torch's product takes one dtype
            q_kept, k_kept, v_kept = q.to(kept), k.to(kept), v.to(kept)
            out = self.forward(q_kept, k_kept, v_kept, cos_sin, positions, cache, metadata, scale, sliding_window)
            return out.to(out_dtype or q.dtype)
        cos, sin = _rotation(plan, cos_sin, positions, q.dtype)
        keys_values = _slots_of(cache)
        _write(plan, _rotate(k, cos, sin), v, keys_values)
        q = _rotate(q, cos, sin)
        block_size = cache.k.shape[1]
        groups, longs = _work(plan, block_size, sliding_window, q.dtype)
        out = torch.empty_like(q)
        for group in groups:
            _attend_group(group, q, keys_values, scale, out)
        for long in longs:
            _attend_long(long, q, keys_values, scale, out)
        return out.to(out_dtype or q.dtype)


def _slots_of(cache: LayerCache) -> Tensor:
    """[num_blocks * block_size, 2, Hkv, D]: keys and values of a slot in one row, as `allocate` laid them."""
    num_blocks, block_size, num_heads, head_dim = cache.k.shape
    size = num_heads * head_dim
    return cache.k.as_strided((num_blocks * block_size, 2, num_heads, head_dim), (2 * size, size, head_dim, 1))


def _rotation(plan: Plan, cos_sin: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the step's positions, [T, 1, D/2] each, looked up once a step."""
    key = (cos_sin.data_ptr(), dtype)
    if key not in plan.rotary:
        cos, sin = cos_sin[positions].to(dtype).unsqueeze(1).chunk(2, dim=-1)
        plan.rotary[key] = (cos.contiguous(), sin.contiguous())
    return plan.rotary[key]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


def _write(plan: Plan, k: Tensor, v: Tensor, keys_values: Tensor) -> None:
    pairs = torch.stack((k, v), dim=1).to(keys_values.dtype)
    keys_values.index_copy_(0, plan.slots, pairs if plan.rows is None else pairs[plan.rows])


def _work(plan: Plan, block_size: int, window: int, dtype: torch.dtype) -> tuple[list[Group], list[Long]]:
    if window not in plan.work:
        tables, lens, singles = plan.block_tables, plan.seq_lens, plan.num_singles
        groups = make_groups(tables, lens, singles, block_size, window, dtype)
        longs = make_longs(tables, plan.starts, lens, singles, block_size, window, dtype)
        plan.work[window] = (groups, longs)
    return plan.work[window]


def _attend_group(group: Group, q: Tensor, keys_values: Tensor, scale: float, out: Tensor) -> None:
    """One query token a sequence: the query heads of a key head stand where query positions would, so keys are not repeated."""
    num_seqs, length = group.num_seqs, group.length
    num_kv_heads, head_dim = keys_values.shape[2], keys_values.shape[3]
    gathered = keys_values.index_select(0, group.slots).view(num_seqs, length, 2, num_kv_heads, head_dim)
    keys, values = gathered[:, :, 0].transpose(1, 2), gathered[:, :, 1].transpose(1, 2)
    mine = q[:num_seqs] if group.rows is None else q[group.rows]
    queries = mine.view(num_seqs, num_kv_heads, -1, head_dim)
    found = scaled_dot_product_attention(queries, keys.to(q.dtype), values.to(q.dtype), attn_mask=group.mask, scale=scale)
    found = found.reshape(mine.shape)
    if group.rows is None:
        out[:num_seqs] = found
    else:
        out[group.rows] = found


def _attend_long(long: Long, q: Tensor, keys_values: Tensor, scale: float, out: Tensor) -> None:
    """One sequence's chunk: key heads are the batch, their query heads share keys through a stride of zero."""
    num_kv_heads, head_dim = keys_values.shape[2], keys_values.shape[3]
    gathered = keys_values.index_select(0, long.slots)
    group = q.shape[1] // num_kv_heads
    queries = q[long.first : long.last].view(-1, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    keys, values = (
        side.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1).to(q.dtype) for side in (gathered[:, 0], gathered[:, 1])
    )
    found = scaled_dot_product_attention(queries, keys, values, attn_mask=long.mask, is_causal=long.mask is None, scale=scale)
    out[long.first : long.last] = found.permute(2, 0, 1, 3).reshape(-1, q.shape[1], head_dim)
