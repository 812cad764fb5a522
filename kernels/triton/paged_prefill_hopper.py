"""Prefill attention for Hopper: the same walk as `paged_prefill`, in Gluon, with products and softmax side by side.

Two warp groups take 64 rows each. While they compute the softmax of one tile, the tensor cores have two products in their
queue: the scores of the next tile and the previous tile's probabilities times V. K and V come by `cp.async` into two rings.
16-bit inputs and head sizes of 64 and 128 only, no sliding window. Runs under Triton 3.6 to 3.9, whose names for two functions differ.
"""

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

_async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

BLOCK_M = 128
"""Query rows of one program: 64 for each of two warp groups."""


@gluon.jit
def _look_up(
    p_table, i_start, end, stride_block, stride_slot, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """Where a tile's positions are in the caches, in 16 bytes from position 0 of block 0. Result: [TILE] int32.

    Positions from `end` on repeat the last one: what they hold is hidden, but must not be NaN.
    """
    i_n = gl.minimum(i_start + gl.arange(0, TILE, layout=gl.SliceLayout(1, LAYOUT)), end - 1).to(gl.uint32)
    i_block = gl.load(p_table + i_n // BLOCK_SIZE)
    return i_block * (stride_block // 8) + (i_n % BLOCK_SIZE).to(gl.int32) * (stride_slot // 8)


@gluon.jit
def _start_copy(slot, p_row, o_rows):
    """Starts the copy of a tile's keys or values. slot: [TILE, D] shared; p_row: [1, D] pointers; o_rows: as by `_look_up`."""
    _async_load(slot, p_row + (o_rows.to(gl.int64) * 8)[:, None])


@gluon.jit
def _softmax(b_score, b_max, b_sum, b_position, i_start, qk_scale, TILE: gl.constexpr, MASKED: gl.constexpr):
    """(probabilities [rows, TILE] float32, new maxima, new sums, decay of what was summed before).

    MASKED hides what comes after `b_position`. Every row sees position 0, so that no maximum stays at minus infinity.
    """
    if MASKED:
        scores: gl.constexpr = b_score.type.layout
        i_n = i_start + gl.arange(0, TILE, layout=gl.SliceLayout(0, scores))
        b_score = gl.where(i_n[None, :] <= b_position[:, None], b_score, float("-inf"))
    b_new_max = gl.maximum(b_max, gl.max(b_score, 1) * qk_scale)
    b_p = gl.exp2(b_score * qk_scale - b_new_max[:, None])
    b_decay = gl.exp2(b_max - b_new_max)
    return b_p, b_new_max, b_sum * b_decay + gl.sum(b_p, 1), b_decay


@gluon.jit
def _walk(
    b_out, b_score, b_max, b_sum, o_k, o_v, b_q, b_position, k_ring, v_ring, p_k, p_v, p_table,
    first, last, end, stride_block, stride_slot, qk_scale,
    BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, COPY: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Tiles [first, last); there is a tile after each of them.

    Enters and leaves with tile `first`'s (then `last`'s) scores done, the previous tile's product with V under way, and copies
    under way of K up to tile first + STAGES, of V to one tile less. o_k, o_v: rows of the next to copy, as by `_look_up`.
    """
    scores: gl.constexpr = b_score.type.layout
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])
    probabilities: gl.constexpr = gl.DotOperandLayout(0, outputs, 2)
    rows: gl.constexpr = gl.SliceLayout(1, outputs)
    for i_tile in range(first, last):
        # The next K and this V: waiting ends in a barrier, and the fence shows what it let through to the tensor cores.
        async_copy.wait_group(STAGES - 1)
        fence_async_shared()
        b_zero = gl.zeros(b_score.shape, gl.float32, scores)
        k_next = k_ring.index((i_tile + 1) % STAGES).permute((1, 0))
        b_next = warpgroup_mma(b_q, k_next, b_zero, use_acc=False, is_async=True)
        b_p, b_max, b_sum, b_decay = _softmax(b_score, b_max, b_sum, b_position, i_tile * TILE, qk_scale, TILE, MASKED)
        b_p16 = gl.convert_layout(b_p.to(b_q.dtype), probabilities)
        # Not 1 and then 0: what is under way when the loop turns around can't be told apart from what is not (ptxas C7514).
        b_score, b_out = warpgroup_mma_wait(0, deps=(b_next, b_out))
        b_out = b_out * gl.convert_layout(b_decay, rows)[:, None]
        b_out = warpgroup_mma(b_p16, v_ring.index(i_tile % (STAGES + 1)), b_out, is_async=True)
        # Behind this barrier nobody reads the next tile's K, nor the V of the tile before.
        _barrier()
        _start_copy(k_ring.index((i_tile + 1) % STAGES), p_k, o_k)
        _start_copy(v_ring.index((i_tile + STAGES) % (STAGES + 1)), p_v, o_v)
        async_copy.commit_group()
        o_v = o_k
        o_k = _look_up(p_table, (i_tile + STAGES + 2) * TILE, end, stride_block, stride_slot, BLOCK_SIZE, TILE, COPY)
    return b_out, b_score, b_max, b_sum, o_k, o_v


@gluon.jit(do_not_specialize=["num_seqs", "first_seq", "stride_table"])
def prefill_hopper_kernel(
    p_out,
    p_q,
    p_k,
    p_v,
    p_tables,
    p_seq_lens,
    p_query_starts,
    p_starts,
    p_owners,
    num_seqs,
    first_seq,
    qk_scale,
    stride_q_token,
    stride_q_head,
    stride_block,
    stride_slot,
    stride_head,
    stride_table,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """As `paged_prefill.prefill_kernel` without a window, for 8 warps and BLOCK_M 128. STAGES: tiles in K's ring; V's has one more."""
    i_entry = gl.load(p_starts + num_seqs) - 1 - gl.program_id(0)
    if i_entry >= 0:
        dtype: gl.constexpr = p_q.dtype.element_ty
        copy: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [8, 1], [1, 0])
        scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, TILE, 16])
        outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])
        shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        tokens: gl.constexpr = BLOCK_M // GROUP

        i_kv_head = gl.program_id(1)
        i_owner = gl.load(p_owners + i_entry)
        i_seq = (first_seq + i_owner).to(gl.int64)
        seq_len = gl.load(p_seq_lens + i_seq)
        i_first_token = gl.load(p_query_starts + i_seq)
        num_tokens = gl.load(p_query_starts + i_seq + 1) - i_first_token
        i_begin = (i_entry - gl.load(p_starts + i_owner)) * tokens
        first_position = seq_len - num_tokens + i_begin
        last_position = seq_len - num_tokens + gl.minimum(i_begin + tokens, num_tokens) - 1
        p_table = p_tables + i_seq * stride_table

        # Tiles [0, whole_to) are seen by every row, the rest crosses the diagonal. The last is taken apart: no scores follow it.
        end = last_position + 1
        final = (end + TILE - 1) // TILE - 1
        whole_to = gl.minimum((first_position + 1) // TILE, final)

        k_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], shared)
        v_ring = gl.allocate_shared_memory(dtype, [STAGES + 1, TILE, D], shared)
        # K is one tile ahead of V all the way, because scores are.
        i_d = gl.arange(0, D, layout=gl.SliceLayout(0, copy))
        p_k_row = p_k + i_kv_head.to(gl.int64) * stride_head + i_d[None, :]
        p_v_row = p_v + i_kv_head.to(gl.int64) * stride_head + i_d[None, :]
        o_v = _look_up(p_table, 0, end, stride_block, stride_slot, BLOCK_SIZE, TILE, copy)
        _start_copy(k_ring.index(0), p_k_row, o_v)
        async_copy.commit_group()
        for i_tile in gl.static_range(1, STAGES):
            o_k = _look_up(p_table, i_tile * TILE, end, stride_block, stride_slot, BLOCK_SIZE, TILE, copy)
            _start_copy(k_ring.index(i_tile), p_k_row, o_k)
            _start_copy(v_ring.index(i_tile - 1), p_v_row, o_v)
            async_copy.commit_group()
            o_v = o_k
        o_k = _look_up(p_table, STAGES * TILE, end, stride_block, stride_slot, BLOCK_SIZE, TILE, copy)

        i_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, copy))
        i_token = i_begin + i_m // GROUP
        i_head = i_kv_head * GROUP + i_m % GROUP
        m_row = (i_m < tokens * GROUP) & (i_token < num_tokens)
        o_token = (i_first_token + i_token).to(gl.int64)
        p_q_tile = p_q + o_token[:, None] * stride_q_token + i_head[:, None] * stride_q_head + i_d[None, :]
        b_q = gl.convert_layout(gl.load(p_q_tile, mask=m_row[:, None], other=0.0), gl.DotOperandLayout(0, scores, 2))
        # Rows that pad the tile follow the last token, so that they see something and stay finite.
        i_row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, scores))
        b_position = gl.minimum(first_position + i_row // GROUP, last_position)

        b_out = warpgroup_mma_init(gl.zeros([BLOCK_M, D], gl.float32, outputs))
        b_max = gl.full([BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
        b_sum = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, scores))
        async_copy.wait_group(STAGES - 1)
        fence_async_shared()
        b_score = gl.zeros([BLOCK_M, TILE], gl.float32, scores)
        b_score = warpgroup_mma(b_q, k_ring.index(0).permute((1, 0)), b_score, use_acc=False)
        _barrier()
        _start_copy(k_ring.index(0), p_k_row, o_k)
        _start_copy(v_ring.index(STAGES - 1), p_v_row, o_v)
        async_copy.commit_group()
        o_v = o_k
        o_k = _look_up(p_table, (STAGES + 1) * TILE, end, stride_block, stride_slot, BLOCK_SIZE, TILE, copy)

        b_out, b_score, b_max, b_sum, o_k, o_v = _walk(
            b_out, b_score, b_max, b_sum, o_k, o_v, b_q, b_position, k_ring, v_ring, p_k_row, p_v_row, p_table,
            0, whole_to, end, stride_block, stride_slot, qk_scale, BLOCK_SIZE, TILE, D, STAGES, copy, False,
        )  # fmt: skip
        b_out, b_score, b_max, b_sum, o_k, o_v = _walk(
            b_out, b_score, b_max, b_sum, o_k, o_v, b_q, b_position, k_ring, v_ring, p_k_row, p_v_row, p_table,
            whole_to, final, end, stride_block, stride_slot, qk_scale, BLOCK_SIZE, TILE, D, STAGES, copy, True,
        )  # fmt: skip

        async_copy.wait_group(0)
        fence_async_shared()
        b_p, b_max, b_sum, b_decay = _softmax(b_score, b_max, b_sum, b_position, final * TILE, qk_scale, TILE, True)
        b_out = warpgroup_mma_wait(0, deps=(b_out,))
        b_out = b_out * gl.convert_layout(b_decay, gl.SliceLayout(1, outputs))[:, None]
        b_p16 = gl.convert_layout(b_p.to(dtype), gl.DotOperandLayout(0, outputs, 2))
        b_out = warpgroup_mma(b_p16, v_ring.index(final % (STAGES + 1)), b_out)

        b_out = b_out / gl.convert_layout(b_sum, gl.SliceLayout(1, outputs))[:, None]
        o_row = o_token * (NUM_KV_HEADS * GROUP) + i_head
        gl.store(p_out + o_row[:, None] * D + i_d[None, :], gl.convert_layout(b_out.to(dtype), copy), mask=m_row[:, None])
