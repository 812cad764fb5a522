"""Plain-torch twin of each operator, same name and signature: the specification, and the fallback on any device.

Shapes outermost first. T tokens of a step's flat batch, S sequences, Hq query heads, Hkv key/value heads (Hq a multiple of
Hkv: query head h reads key/value head h // (Hq // Hkv)), D head size. Caches are `[num_blocks, block_size, Hkv, D]` by shape;
their strides are the backend's choice. Arithmetic that sums runs in float32 and is rounded once at the end.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels.draws import uniforms
from kernels.filters import inverse_cdf, keep_from, keep_thresholds, pad_to_blocks, row_best


def embedding(table: Tensor, ids: Tensor) -> Tensor:
    """table[ids]. table: [V, H]; ids: [T] int64, each in [0, V); out: [T, H]."""
    return functional.embedding(ids, table)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """out = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019). x: [T, H], weight: [H], out: [T, H] in x's dtype."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = x + residual in their dtype. All [T, H]."""
    total = x + residual
    return rms_norm(total, weight, eps), total


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """What a packed linear multiplies by: `weight` [out, in] float32 as its format stores it; `by_bytes`: rows are quantised too."""

    weight: Tensor
    by_bytes: bool
    gated: bool


def pack_weight(weight: Tensor, format: str, gated: bool, group: int, *, byte_limit: int = 127) -> PackedWeight:
    """A weight [out, in] as `format` stores it: float32, bfloat16, int8 or int4.

    int8: q * scale, one scale an output, the largest magnitude is `byte_limit` (64 where a processor sums two products of bytes in
    16 bits, so that each sum is exact). int4: q in [-8, 7] times a float16 scale for each `group`
    inputs of an output; the value of largest magnitude is -8. `gated`: the first half of the outputs is SiLU's gate of the second.
    """
    wide = weight.float()
    if format == "bfloat16":
        wide = weight.bfloat16().float()
    elif format == "int8":
        scale = wide.abs().amax(dim=1, keepdim=True) / byte_limit
        wide = (wide / scale.clamp_min(1e-38)).round() * scale
    elif format == "int4":
        missing = -wide.shape[1] % group
        groups = functional.pad(wide, (0, missing)).unflatten(1, (-1, group))
        extreme = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
        scale = (extreme / -8).half().float()
        stored = (groups / torch.where(scale == 0, 1.0, scale)).round().clamp(-8, 7) * scale
        wide = stored.flatten(1)[:, : wide.shape[1]]
    return PackedWeight(weight=wide, by_bytes=format in ("int8", "int4"), gated=gated)


def linear(
    x: Tensor,
    packed: PackedWeight,
    norm_weight: Tensor | None,
    eps: float,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """epilogue(norm(x) W^T + bias) + residual in float32, rounded once to `out_dtype` (None: x's).

    x: [T, in]; norm_weight: [in] of x's dtype, RMSNorm before the product; bias: [out]; residual and out: [T, out], or [T, out / 2]
    when the weight is gated: silu(gate) * up; bias and residual of one dtype. By bytes, a row becomes q * scale
    with the largest magnitude 127 before the product.
    """
    wide = x.float()
    if norm_weight is not None:
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * norm_weight.float()
    if packed.by_bytes:
        scale = wide.abs().amax(dim=1, keepdim=True) / 127
        wide = (wide / scale.clamp_min(1e-38)).round() * scale
    out = functional.linear(wide, packed.weight, None if bias is None else bias.float())
    if packed.gated:
        out = silu_mul(out)
    if residual is not None:
        out = out + residual.float()
    return out.to(out_dtype or x.dtype)


def pack_screen(packed: PackedWeight, norm_weight: Tensor | None) -> PackedWeight:
    """What `greedy_linear` may look at first, of a weight in float32 or bfloat16, not gated; here the weight itself."""
    return packed


def greedy_linear(
    x: Tensor, packed: PackedWeight, screen: PackedWeight | None, norm_weight: Tensor | None, eps: float
) -> Tensor:
    """greedy(linear(...)) of the logits that `linear` gives as float32, ties and odd numbers as there: [T] int64.

    x: [T, in], norm_weight: [in], as for `linear`; not gated. `screen`: None, or what `pack_screen` made of `packed`; it cannot change
    the result.
    """
    return greedy(linear(x, packed, norm_weight, eps, None, None, torch.float32))


def float_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for logits. x: [T, in]; weight: [out, in]; out: [T, out] float32; here rounded to x's dtype on the way."""
    return functional.linear(x, weight).float()


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


def in_bytes(x: Tensor) -> Tensor:
    """What a cache of int8 holds of keys (rotated) or values [..., D]: whole numbers times a bfloat16 scale of each row. out: float32.

    The scale is a 127th of the row's largest magnitude; rows below 1e-30 are 0, a row with an infinite or no number has no number.
    """
    wide = x.float()
    largest = wide.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(largest > 1e-30, largest / 127, 0.0).bfloat16().float()
    codes = torch.where(scale > 0, (wide * (1.0 / scale)).round(), 0.0)
    return codes * scale + (wide * 0.0).sum(dim=-1, keepdim=True)


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
    scale: float,
    sliding_window: int,
) -> Tensor:
    """One layer's attention whole: `rotary_kv_write`, then `paged_attention` over what it wrote. Twin of `kernels.cpu.attention.attend`."""
    q = rotary_kv_write(q, k, v, cos_sin, positions, k_cache, v_cache, slot_mapping)
    return paged_attention(q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, scale, sliding_window)


def greedy(logits: Tensor) -> Tensor:
    """The first index of each row's greatest value; -1 where the row holds NaN or +inf, or nothing finite.

    logits: [N, V] float32; out: [N] int64.
    """
    values, tokens = row_best(pad_to_blocks(logits))
    return torch.where(torch.isfinite(values), tokens, -1)


def sample(logits: Tensor, filters: Tensor, draws: Tensor) -> Tensor:
    """The next token of each row, a function of that row alone: [N] int64, -1 as for `greedy`.

    logits: [N, V] float32. Host tensors: filters [N, 4] float64, temperature (0: greedy), top-k (0: off), top-p (1: off) and
    min-p (0: off), applied in this order; draws [N, 3] int64, (seed, choice, output position). One draw by inverse CDF in token-id
    order. A filter keeps every value that equals its threshold (`kernels/filters.py`); running sums are float64.
    """
    rows = pad_to_blocks(logits)
    best, tokens = row_best(rows)
    drawn = (filters[:, 0] > 0.0).nonzero().squeeze(1)
    if drawn.numel():
        on = logits.device
        temperature, top_k, top_p, min_p = filters[drawn].unbind(1)
        index = drawn.to(on)
        scaled = rows[index].sub_(best[index].unsqueeze(1)).mul_((1.0 / temperature).float().to(on).unsqueeze(1))
        weights = scaled.exp()
        filtered = ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0)).nonzero().squeeze(1)
        if filtered.numel():
            picked = filtered.to(on)
            part, mass = scaled[picked], weights[picked]
            spare = torch.empty_like(part)
            least = keep_thresholds(part, mass, top_k[filtered].long(), top_p[filtered], spare)
            keep_from(part, mass, torch.maximum(min_p[filtered].log().float().to(on), least), spare)
            weights[picked] = mass
        chances = uniforms(*draws[drawn].unbind(1)).to(on)
        tokens[index] = inverse_cdf(weights, chances)
    return torch.where(torch.isfinite(best), tokens, -1)


def logprobs(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural-log probabilities of each row's token, and its `count` best tokens with theirs, best first, equals by id.

    logits: [N, V] float32; tokens: [N] int64, each in [0, V); 0 <= count <= V. out: [N] float32, [N, count] int64, [N, count] float32.
    """
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, tokens.unsqueeze(1)) - normaliser
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return chosen.squeeze(1), ids[:, :count].contiguous(), values[:, :count] - normaliser
