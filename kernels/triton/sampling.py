"""Greedy choice and sampling of every row of a step at once, without waiting for the device.

Twins of `kernels.reference.greedy` and `sample`: the same filters with the same ties, sums in an order of their own (float64; float32
inside a tile of the search for top-p). A row is cut into chunks that stand side by side on the device; thresholds of top-k and top-p are
found by search over the bits of a value, not by a sort. Every row's result is a function of that row alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.draws import uniforms
from kernels.transfer import to_device
from kernels.triton import tuning

EVERYTHING: tl.constexpr = tl.constexpr(0x7F800000)
"""The bits of infinity: a limit that lets everything through."""


@triton.jit(do_not_specialize=["vocab", "num_chunks"])
def chunk_best_kernel(p_values, p_places, p_logits, vocab, num_chunks, CHUNK: tl.constexpr):
    """The greatest value of each chunk of each row and its first place; +inf where the chunk holds a NaN. p_values: [N, num_chunks]."""
    i_row = tl.program_id(0).to(tl.int64)
    i_chunk = tl.program_id(1)
    i_token = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_x = tl.load(p_logits + i_row * vocab + i_token, mask=i_token < vocab, other=float("-inf"))  # [CHUNK]
    b_x = tl.where(b_x != b_x, float("inf"), b_x)
    value, place = tl.max(b_x, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(p_values + i_row * num_chunks + i_chunk, value)
    tl.store(p_places + i_row * num_chunks + i_chunk, i_chunk * CHUNK + place)


@triton.jit(do_not_specialize=["num_chunks"])
def row_best_kernel(p_tokens, p_best, p_values, p_places, num_chunks, CHUNKS: tl.constexpr):
    """From chunks to rows: the greatest value, and its first place or -1 where it is not finite. CHUNKS: num_chunks, padded."""
    i_row = tl.program_id(0).to(tl.int64)
    i_chunk = tl.arange(0, CHUNKS)
    b_value = tl.load(p_values + i_row * num_chunks + i_chunk, mask=i_chunk < num_chunks, other=float("-inf"))  # [CHUNKS]
    best, chunk = tl.max(b_value, 0, return_indices=True, return_indices_tie_break_left=True)
    place = tl.load(p_places + i_row * num_chunks + chunk).to(tl.int64)
    tl.store(p_best + i_row, best)
    tl.store(p_tokens + i_row, tl.where(tl.abs(best) < float("inf"), place, -1))


@triton.jit
def _distances(p_row, i_token, vocab, best, inverse_temperature):
    """How far each logit lies below the best, over the temperature: >= 0, infinite behind the row's end."""
    b_x = tl.load(p_row + i_token, mask=i_token < vocab, other=float("-inf"))
    return (best - b_x) * inverse_temperature


@triton.jit
def _within(p_row, vocab, best, inverse_temperature, t0, t1, t2, limit, MASS: tl.constexpr, TILE: tl.constexpr):
    """Of distances whose bits are at most t0, t1, t2 (and limit): their number, or with MASS the sum of exp(-distance)."""
    s0 = tl.full([], 0, tl.float64)
    s1, s2 = s0, s0
    for i_start in tl.range(0, vocab, TILE):
        b_far = _distances(p_row, i_start + tl.arange(0, TILE), vocab, best, inverse_temperature)  # [TILE]
        b_bits = b_far.to(tl.int32, bitcast=True)
        b_weight = tl.where(b_bits <= limit, tl.exp(-b_far), 0.0) if MASS else tl.where(b_bits <= limit, 1.0, 0.0)
        s0 += tl.sum(tl.where(b_bits <= t0, b_weight, 0.0), 0).to(tl.float64)
        s1 += tl.sum(tl.where(b_bits <= t1, b_weight, 0.0), 0).to(tl.float64)
        s2 += tl.sum(tl.where(b_bits <= t2, b_weight, 0.0), 0).to(tl.float64)
    return s0, s1, s2


@triton.jit
def _search(p_row, vocab, best, inverse_temperature, wanted, limit, MASS: tl.constexpr, TILE: tl.constexpr):
    """The smallest bits, at most `limit`, within which lie `wanted` values (or so much mass); `limit` where all of it is less."""
    low, high = 0, limit
    while low < high:
        quarter = (high - low) // 4
        t0, t1, t2 = low + quarter, low + (high - low) // 2, high - 1 - quarter
        s0, s1, s2 = _within(p_row, vocab, best, inverse_temperature, t0, t1, t2, limit, MASS, TILE)
        high = tl.where(s0 >= wanted, t0, tl.where(s1 >= wanted, t1, tl.where(s2 >= wanted, t2, high)))
        low = tl.where(s0 >= wanted, low, tl.where(s1 >= wanted, t0 + 1, tl.where(s2 >= wanted, t1 + 1, t2 + 1)))
    return high


@triton.jit(do_not_specialize=["vocab"])
def limit_kernel(p_limits, p_logits, p_best, p_settings, p_numbers, vocab, TILE: tl.constexpr):
    """The bits of the greatest distance that a row's top-k, then top-p, then min-p lets through; `EVERYTHING` where it asks for none."""
    i_row = tl.program_id(0).to(tl.int64)
    inverse_temperature = tl.load(p_settings + i_row * 3).to(tl.float32, bitcast=True)
    top_k = tl.load(p_settings + i_row * 3 + 1)
    top_p = tl.load(p_numbers + i_row * 2 + 1)
    limit = 0x7F800000
    best = tl.load(p_best + i_row)
    # A greedy row has an inverse temperature of 0; one that is not finite says nothing whatever is kept of it.
    if (inverse_temperature > 0) & (tl.abs(best) < float("inf")):
        p_row = p_logits + i_row * vocab
        if (top_k > 0) & (top_k < vocab):
            limit = _search(p_row, vocab, best, inverse_temperature, top_k.to(tl.float64), limit, False, TILE)
        if top_p < 1.0:
            _, _, mass = _within(p_row, vocab, best, inverse_temperature, 0, 0, limit, limit, True, TILE)
            limit = _search(p_row, vocab, best, inverse_temperature, top_p * mass, limit, True, TILE)
        limit = tl.minimum(limit, tl.load(p_settings + i_row * 3 + 2))
    tl.store(p_limits + i_row, limit)


@triton.jit
def _weights(p_row, i_token, vocab, best, inverse_temperature, limit):
    """exp(-distance) of what the limit lets through, else 0: [len(i_token)] float64."""
    b_far = _distances(p_row, i_token, vocab, best, inverse_temperature)
    return tl.where(b_far.to(tl.int32, bitcast=True) <= limit, tl.exp(-b_far), 0.0).to(tl.float64)


@triton.jit(do_not_specialize=["vocab", "num_chunks"])
def mass_kernel(p_masses, p_logits, p_best, p_settings, p_limits, vocab, num_chunks, CHUNK: tl.constexpr):
    """The weight of each chunk of each row that is drawn: [N, num_chunks] float64."""
    i_row = tl.program_id(0).to(tl.int64)
    i_chunk = tl.program_id(1)
    inverse_temperature = tl.load(p_settings + i_row * 3).to(tl.float32, bitcast=True)
    if inverse_temperature > 0:
        i_token = i_chunk * CHUNK + tl.arange(0, CHUNK)
        best, limit = tl.load(p_best + i_row), tl.load(p_limits + i_row)
        b_weight = _weights(p_logits + i_row * vocab, i_token, vocab, best, inverse_temperature, limit)
        tl.store(p_masses + i_row * num_chunks + i_chunk, tl.sum(b_weight, 0))


@triton.jit(do_not_specialize=["vocab", "num_chunks"])
def draw_kernel(
    p_tokens,
    p_logits,
    p_best,
    p_settings,
    p_numbers,
    p_limits,
    p_masses,
    vocab,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Inverse CDF in token order: the chunk, then the token, at which the running weight passes a row's uniform number x its total."""
    i_row = tl.program_id(0).to(tl.int64)
    inverse_temperature = tl.load(p_settings + i_row * 3).to(tl.float32, bitcast=True)
    token = tl.load(p_tokens + i_row)
    if (inverse_temperature > 0) & (token >= 0):
        i_chunk = tl.arange(0, CHUNKS)
        b_mass = tl.load(p_masses + i_row * num_chunks + i_chunk, mask=i_chunk < num_chunks, other=0.0)  # [CHUNKS]
        b_edge = tl.cumsum(b_mass, 0)
        total = tl.max(b_edge, 0)
        below_total = (total.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)
        target = tl.minimum(tl.load(p_numbers + i_row * 2) * total, below_total)
        chunk = tl.sum(((b_edge <= target) & (i_chunk < num_chunks)).to(tl.int32), 0)
        chunk = tl.minimum(chunk, num_chunks - 1)
        before = tl.max(tl.where(i_chunk < chunk, b_edge, 0.0), 0)
        i_token = chunk * CHUNK + tl.arange(0, CHUNK)
        best, limit = tl.load(p_best + i_row), tl.load(p_limits + i_row)
        b_weight = _weights(p_logits + i_row * vocab, i_token, vocab, best, inverse_temperature, limit)  # [CHUNK]
        passed = tl.sum((before + tl.cumsum(b_weight, 0) <= target).to(tl.int32), 0)
        # The two sums may round differently: stay on the chunk's last token that has weight.
        last = tl.max(tl.where(b_weight > 0, tl.arange(0, CHUNK), 0), 0)
        tl.store(p_tokens + i_row, (chunk * CHUNK + tl.minimum(passed, last)).to(tl.int64))


def _best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first place of each row's greatest value ([N] int64, -1 where it is not finite), and the value ([N] float32)."""
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"sampling wants contiguous float32 rows, not {logits.dtype} of strides {logits.stride()}")
    num_rows, vocab = logits.shape
    num_chunks = triton.cdiv(vocab, tuning.SAMPLE_CHUNK)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    best = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        values = torch.empty((num_rows, num_chunks), dtype=torch.float32, device=logits.device)
        places = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=logits.device)
        grid, options = (num_rows, num_chunks), tuning.COMPILER_OPTIONS
        chunk_best_kernel[grid](
            values, places, logits, vocab, num_chunks, CHUNK=tuning.SAMPLE_CHUNK, num_warps=tuning.SAMPLE_WARPS, **options
        )
        row_best_kernel[(num_rows,)](
            tokens, best, values, places, num_chunks, CHUNKS=triton.next_power_of_2(num_chunks), num_warps=1, **options
        )
    return tokens, best


def greedy(logits: Tensor) -> Tensor:
    """The first index of each row's greatest value; -1 where the row holds NaN or +inf, or nothing finite.

    logits: [N, V] float32, contiguous; out: [N] int64. Raises ValueError for other types and strides.
    """
    return _best(logits)[0]


def sample(logits: Tensor, filters: Tensor, draws: Tensor) -> Tensor:
    """The next token of each row, a function of that row alone: [N] int64, -1 as for `greedy`.

    logits: [N, V] float32, contiguous. Host tensors: filters [N, 4] float64, temperature (0: greedy), top-k (0: off), top-p (1: off) and
    min-p (0: off), applied in this order; draws [N, 3] int64, (seed, choice, output position). Raises as `greedy`.
    """
    tokens, best = _best(logits)
    temperature, top_k, top_p, min_p = filters.unbind(1)
    drawn = temperature > 0
    if not bool(drawn.any()):
        return tokens
    num_rows, vocab = logits.shape
    inverse = torch.where(drawn, 1.0 / temperature, 0.0).float().view(torch.int32)
    # The distance of min-p: -log, and never -0, whose bits would be negative.
    farthest = min_p.log().neg().float().abs().view(torch.int32)
    settings = to_device(torch.stack((inverse, top_k.to(torch.int32), farthest), 1), logits.device)
    numbers = to_device(torch.stack((uniforms(*draws.unbind(1)), top_p), 1), logits.device)
    limits = torch.full((num_rows,), EVERYTHING.value, dtype=torch.int32, device=logits.device)
    num_chunks, options = triton.cdiv(vocab, tuning.SAMPLE_CHUNK), tuning.COMPILER_OPTIONS
    if bool((drawn & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0))).any()):
        limit_kernel[(num_rows,)](
            limits,
            logits,
            best,
            settings,
            numbers,
            vocab,
            TILE=tuning.LIMIT_TILE,
            num_warps=tuning.LIMIT_WARPS,
            **options,
        )
    masses = torch.empty((num_rows, num_chunks), dtype=torch.float64, device=logits.device)
    common = {"CHUNK": tuning.SAMPLE_CHUNK, "num_warps": tuning.SAMPLE_WARPS, **options}
    mass_kernel[(num_rows, num_chunks)](masses, logits, best, settings, limits, vocab, num_chunks, **common)
    draw_kernel[(num_rows,)](
        tokens,
        logits,
        best,
        settings,
        numbers,
        limits,
        masses,
        vocab,
        num_chunks,
        CHUNKS=triton.next_power_of_2(num_chunks),
        **common,
    )
    return tokens
