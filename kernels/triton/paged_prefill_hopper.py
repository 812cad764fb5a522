"""Prefill attention for Hopper, in Gluon: the walk of `paged_prefill`, with products, softmax and copies side by side.

Four warps copy K and V by `cp.async` into two rings; two warp groups take 64 rows each, at their own pace: while one is in its softmax,
the other's products run, and its own product of the tile before with V (FlashAttention-3, Shah et al. 2024). 16-bit inputs and head
sizes of 64 and 128 only, no sliding window. Runs under Triton 3.6 to 3.9, whose names for two functions differ.
"""

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

_async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

BLOCK_M = 128
"""Query rows of one program: 64 for each of two warp groups."""

LAUNCH = {"num_warps": 4, "maxnreg": 168}
"""Warps before Gluon adds those of the other two roles, and registers: a multiprocessor's over 12 warps."""


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
        scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
        i_n = i_start + gl.arange(0, TILE, layout=gl.SliceLayout(0, scores))
        b_score = gl.where(i_n[None, :] <= b_position[:, None], b_score, float("-inf"))
    b_new_max = gl.maximum(b_max, gl.max(b_score, 1) * qk_scale)
    b_p = gl.exp2(b_score * qk_scale - b_new_max[:, None])
    b_decay = gl.exp2(b_max - b_new_max)
    return b_p, b_new_max, b_sum * b_decay + gl.sum(b_p, 1), b_decay


@gluon.jit
def _run(p_seq_lens, p_query_starts, p_starts, p_owners, first_seq, i_entry, TOKENS: gl.constexpr):
    """An entry's run of tokens: (its sequence, the chunk's first token in the batch, the chunk's length, the run's first token in the
    chunk, positions of its first and last)."""
    i_owner = gl.load(p_owners + i_entry)
    i_seq = first_seq + i_owner
    seq_len = gl.load(p_seq_lens + i_seq)
    i_first_token = gl.load(p_query_starts + i_seq)
    num_tokens = gl.load(p_query_starts + i_seq + 1) - i_first_token
    i_begin = (i_entry - gl.load(p_starts + i_owner)) * TOKENS
    first_position = seq_len - num_tokens + i_begin
    last_position = seq_len - num_tokens + gl.minimum(i_begin + TOKENS, num_tokens) - 1
    return i_seq, i_first_token, num_tokens, i_begin, first_position, last_position


@gluon.jit
def _produce(
    p_k, p_v, p_tables, p_seq_lens, p_query_starts, p_starts, p_owners, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    i_entry, first_seq, stride_block, stride_slot, stride_table,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fills the rings with the tiles of all positions, K before V. p_k, p_v: a head's element 0 in block 0."""
    i_seq, _, _, _, _, last_position = _run(
        p_seq_lens, p_query_starts, p_starts, p_owners, first_seq, i_entry, 128 // GROUP
    )  # fmt: skip
    p_table = p_tables + i_seq.to(gl.int64) * stride_table
    end = last_position + 1
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    i_d = gl.arange(0, D, layout=gl.SliceLayout(0, copy))
    p_k_row = p_k + i_d[None, :]
    p_v_row = p_v + i_d[None, :]
    o_rows = _look_up(p_table, 0, end, stride_block, stride_slot, BLOCK_SIZE, TILE, copy)
    for i_tile in range((end + TILE - 1) // TILE):
        i_slot = i_tile % STAGES
        # A barrier that nobody has passed counts as past the phase before its first.
        phase = ((i_tile // STAGES) & 1) ^ 1
        mbarrier.wait(k_empty.index(i_slot), phase)
        _start_copy(k_ring.index(i_slot), p_k_row, o_rows)
        async_copy.mbarrier_arrive(k_full.index(i_slot), increment_count=False)
        o_next = _look_up(p_table, (i_tile + 1) * TILE, end, stride_block, stride_slot, BLOCK_SIZE, TILE, copy)
        mbarrier.wait(v_empty.index(i_slot), phase)
        _start_copy(v_ring.index(i_slot), p_v_row, o_rows)
        async_copy.mbarrier_arrive(v_full.index(i_slot), increment_count=False)
        o_rows = o_next
    # Shared memory must outlive what is written to it.
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def _walk(
    b_out, b_p16, b_max, b_sum, q_tile, b_position, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    first, last, qk_scale, TILE: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Tiles [first, last), first > 0.

    Enters and leaves with the probabilities of the tile before not yet multiplied by its V, which is there.
    """
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, b_out.shape[1], 16])
    for i_tile in range(first, last):
        i_slot = i_tile % STAGES
        i_before = (i_tile - 1) % STAGES
        phase = (i_tile // STAGES) & 1
        mbarrier.wait(k_full.index(i_slot), phase)
        fence_async_shared()
        b_zero = gl.zeros([64, TILE], gl.float32, scores)
        b_score = warpgroup_mma(q_tile, k_ring.index(i_slot).permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_out = warpgroup_mma(b_p16, v_ring.index(i_before), b_out, is_async=True)
        b_score = warpgroup_mma_wait(1, deps=(b_score,))
        # All warps of the group have read it, not only the one that says so.
        _barrier()
        mbarrier.arrive(k_empty.index(i_slot))
        b_p, b_max, b_sum, b_decay = _softmax(b_score, b_max, b_sum, b_position, i_tile * TILE, qk_scale, TILE, MASKED)
        b_next16 = gl.convert_layout(b_p.to(b_p16.dtype), gl.DotOperandLayout(0, outputs, 2))
        # V is waited for here, and not where it is read, because the assembler moves no arithmetic across this loop: between two
        # products alone it would put most of the softmax behind the second.
        mbarrier.wait(v_full.index(i_slot), phase)
        fence_async_shared()
        b_out = warpgroup_mma_wait(0, deps=(b_out,))
        _barrier()
        mbarrier.arrive(v_empty.index(i_before))
        b_out = b_out * gl.convert_layout(b_decay, gl.SliceLayout(1, outputs))[:, None]
        b_p16 = b_next16
    return b_out, b_p16, b_max, b_sum


@gluon.jit
def _addresses(i_kv_head, i_first_token, num_tokens, i_begin, GROUP: gl.constexpr, HALF: gl.constexpr, LAYOUT: gl.constexpr):
    """Of each row of a half: (its token in the batch, its query head, whether it is one). All [64]."""
    i_m = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    i_token = i_begin + i_m // GROUP
    m_row = (i_m < 128 // GROUP * GROUP) & (i_token < num_tokens)
    return (i_first_token + i_token).to(gl.int64), i_kv_head * GROUP + i_m % GROUP, m_row


@gluon.jit
def _consume(
    p_out, p_q, p_seq_lens, p_query_starts, p_starts, p_owners, q_tiles, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    i_entry, i_kv_head, first_seq, qk_scale, stride_q_token, stride_q_head,
    NUM_Q_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Rows [64 HALF, 64 HALF + 64), from the load of Q to the store."""
    _, i_first_token, num_tokens, i_begin, first_position, last_position = _run(
        p_seq_lens, p_query_starts, p_starts, p_owners, first_seq, i_entry, 128 // GROUP
    )  # fmt: skip
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    i_d = gl.arange(0, D, layout=gl.SliceLayout(0, rows))
    i_row = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, scores))
    o_token, i_head, m_row = _addresses(i_kv_head, i_first_token, num_tokens, i_begin, GROUP, HALF, rows)
    p_q_tile = p_q + o_token[:, None] * stride_q_token + i_head[:, None] * stride_q_head + i_d[None, :]
    q_tile = q_tiles.index(HALF)
    q_tile.store(gl.load(p_q_tile, mask=m_row[:, None], other=0.0))
    fence_async_shared()
    _barrier()
    # Tile 0 is always masked, tiles [1, whole_to) are seen by every row, the others cross the diagonal.
    num_tiles = (last_position + TILE) // TILE
    whole_to = gl.maximum((first_position + 1) // TILE, 1)
    # Rows that pad the tile follow the last token, so that they see something and stay finite.
    b_position = gl.minimum(first_position + i_row // GROUP, last_position)

    b_out = gl.zeros([64, D], gl.float32, outputs)
    b_max = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
    b_sum = gl.zeros([64], gl.float32, gl.SliceLayout(1, scores))
    mbarrier.wait(k_full.index(0), 0)
    fence_async_shared()
    b_score = gl.zeros([64, TILE], gl.float32, scores)
    b_score = warpgroup_mma(q_tile, k_ring.index(0).permute((1, 0)), b_score, use_acc=False, is_async=True)
    b_score = warpgroup_mma_wait(0, deps=(b_score,))
    _barrier()
    mbarrier.arrive(k_empty.index(0))
    b_p, b_max, b_sum, _ = _softmax(b_score, b_max, b_sum, b_position, 0, qk_scale, TILE, True)
    b_p16 = gl.convert_layout(b_p.to(q_tile.dtype), gl.DotOperandLayout(0, outputs, 2))
    mbarrier.wait(v_full.index(0), 0)
    fence_async_shared()
    b_out, b_p16, b_max, b_sum = _walk(
        b_out, b_p16, b_max, b_sum, q_tile, b_position, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
        1, whole_to, qk_scale, TILE, STAGES, False,
    )  # fmt: skip
    b_out, b_p16, b_max, b_sum = _walk(
        b_out, b_p16, b_max, b_sum, q_tile, b_position, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
        whole_to, num_tiles, qk_scale, TILE, STAGES, True,
    )  # fmt: skip
    b_out = warpgroup_mma(b_p16, v_ring.index((num_tiles - 1) % STAGES), b_out, is_async=True)
    # Found out once more, and not kept: registers are short in the loops.
    _, i_first_token, num_tokens, i_begin, _, _ = _run(
        p_seq_lens, p_query_starts, p_starts, p_owners, first_seq, i_entry, 128 // GROUP
    )  # fmt: skip
    o_token, i_head, m_row = _addresses(i_kv_head, i_first_token, num_tokens, i_begin, GROUP, HALF, rows)
    b_out = warpgroup_mma_wait(0, deps=(b_out,))
    b_out = b_out / gl.convert_layout(b_sum, gl.SliceLayout(1, outputs))[:, None]
    o_row = o_token * NUM_Q_HEADS + i_head
    # Through the memory of Q, which nobody reads any more: whole rows are stored.
    q_tile.store(b_out.to(q_tile.dtype))
    gl.store(p_out + o_row[:, None] * D + i_d[None, :], q_tile.load(rows), mask=m_row[:, None])


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
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """As `paged_prefill.prefill_kernel` without a window, for `BLOCK_M` rows; launched with `LAUNCH`. STAGES: tiles in each ring.

    A program for each entry of the list and KV head, heads first, in one axis; surplus programs return.
    """
    # The last tokens see the longest context: they start first, so that the grid's tail is made of short programs.
    i_entry = gl.load(p_starts + num_seqs) - 1 - gl.program_id(0) // NUM_KV_HEADS
    if i_entry >= 0:
        dtype: gl.constexpr = p_q.dtype.element_ty
        shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        barriers: gl.constexpr = mbarrier.MBarrierLayout()
        i_kv_head = gl.program_id(0) % NUM_KV_HEADS
        o_head = i_kv_head.to(gl.int64) * stride_head

        q_tiles = gl.allocate_shared_memory(dtype, [2, 64, D], shared)
        k_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], shared)
        v_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], shared)
        k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
        k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
        v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
        v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
        for i_slot in gl.static_range(STAGES):
            # Every copying thread arrives when its copies have; each computing warp group when it has read.
            mbarrier.init(k_full.index(i_slot), count=128)
            mbarrier.init(v_full.index(i_slot), count=128)
            mbarrier.init(k_empty.index(i_slot), count=2)
            mbarrier.init(v_empty.index(i_slot), count=2)
        gl.warp_specialize(
            [
                (_consume, (
                    p_out, p_q, p_seq_lens, p_query_starts, p_starts, p_owners, q_tiles, k_ring, v_ring,
                    k_full, k_empty, v_full, v_empty, i_entry, i_kv_head, first_seq, qk_scale, stride_q_token, stride_q_head,
                    NUM_KV_HEADS * GROUP, GROUP, D, TILE, STAGES, 0,
                )),
                (_consume, (
                    p_out, p_q, p_seq_lens, p_query_starts, p_starts, p_owners, q_tiles, k_ring, v_ring,
                    k_full, k_empty, v_full, v_empty, i_entry, i_kv_head, first_seq, qk_scale, stride_q_token, stride_q_head,
                    NUM_KV_HEADS * GROUP, GROUP, D, TILE, STAGES, 1,
                )),
                (_produce, (
                    p_k + o_head, p_v + o_head, p_tables, p_seq_lens, p_query_starts, p_starts, p_owners, k_ring, v_ring,
                    k_full, k_empty, v_full, v_empty, i_entry, first_seq, stride_block, stride_slot, stride_table,
                    GROUP, D, BLOCK_SIZE, TILE, STAGES,
                )),
            ],
            [4, 4],
            [208, 88],
        )  # fmt: skip
