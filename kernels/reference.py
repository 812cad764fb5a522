"""Plain-torch twin of each operator, same name and signature: the specification, and the fallback on any device.

Shapes outermost first. T tokens of a step's flat batch, S sequences, Hq query heads, Hkv key/value heads (Hq a multiple of
Hkv: query head h reads key/value head h // (Hq // Hkv)), D head size. Caches are `[num_blocks, block_size, Hkv, D]` by shape;
their strides are the backend's choice. Arithmetic that sums runs in float32 and is rounded once at the end.
"""

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """out = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019). x: [T, H], weight: [H], out: [T, H] in x's dtype."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = x + residual in their dtype. All [T, H]."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. gate_up: [T, 2 * I], gate first; out: [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def apply_rotary(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Rotates each head's halves (x1, x2) to (x1 cos - x2 sin, x2 cos + x1 sin), the NeoX form (Su et al. 2021).

    x: [T, heads, D]; cos_sin: [max_positions, D] float32, cosines of the D/2 frequencies, then sines; positions: [T] int64.
    """
    cos, sin = cos_sin[positions].unsqueeze(1).to(x.dtype).chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotary_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Rotates q and k, writes k and v into the cache, returns the rotated q.

    q: [T, Hq, D]; k, v: [T, Hkv, D]; slot_mapping: [T] int64, block_id * block_size + offset, -1 = do not write.
    """
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    block_size = k_cache.shape[1]
    blocks, offsets = slots // block_size, slots % block_size
    k_cache[blocks, offsets] = apply_rotary(k, cos_sin, positions)[written].to(k_cache.dtype)
    v_cache[blocks, offsets] = v[written].to(v_cache.dtype)
    return apply_rotary(q, cos_sin, positions)


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
    """Causal attention of each sequence's chunk over its whole paged context (Kwon et al. 2023).

    q: [T, Hq, D], the chunks one after another; block_tables: [S, max_blocks] int32, padded; seq_lens: [S] int32, context with
    the chunk; query_start_loc: [S + 1] int32. Row j of a chunk of n tokens sees the first seq_len - n + j + 1 positions, the
    last `sliding_window` of them when that is above 0. out: [T, Hq, D].
    """
    out = torch.empty_like(q)
    block_size, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    group = q.shape[1] // num_kv_heads
    starts = query_start_loc.tolist()
    for i, seq_len in enumerate(seq_lens.tolist()):
        first, last = starts[i], starts[i + 1]
        if first == last:
            continue
        blocks = block_tables[i, : (seq_len + block_size - 1) // block_size].long()
        keys = k_cache[blocks].flatten(0, 1)[:seq_len].float().repeat_interleave(group, dim=1)
        values = v_cache[blocks].flatten(0, 1)[:seq_len].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[first:last].float(), keys) * scale
        row = torch.arange(seq_len - (last - first), seq_len, device=q.device)[:, None]
        column = torch.arange(seq_len, device=q.device)[None, :]
        hidden = column > row
        if sliding_window:
            hidden |= column <= row - sliding_window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out
