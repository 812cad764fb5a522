"""Prefill attention for Hopper with split roles: four warps copy, two warp groups compute, and nobody waits for all.

The work, the arithmetic and the limits of `paged_prefill_hopper`, which see. Each computing warp group takes 64 rows at its own
pace: while one is in its softmax, the other's products run, and its own product of the tile before with V. A program may take
several items, one after another: the copying warps are then ahead in the next one, and nothing starts anew.
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

from kernels.triton.paged_prefill_hopper import _barrier, _look_up, _softmax, _start_copy


@gluon.jit
def _item(
    i_round, count, i_program, num_programs, p_seq_lens, p_query_starts, p_starts, p_owners, first_seq,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """A program's item of a round: (KV head, sequence, its first token in the batch, the number of its tokens, and for the run of
    tokens: the first in the chunk, its position, the position of the last). Items of the longest context come first.
    """
    tokens: gl.constexpr = BLOCK_M // GROUP
    # Rounds go to and fro, so that what is longer and shorter evens out.
    place = gl.where(i_round % 2 == 0, i_program, num_programs - 1 - i_program)
    i_item = i_round * num_programs + place
    i_entry = count - 1 - i_item // NUM_KV_HEADS
    i_owner = gl.load(p_owners + i_entry)
    i_seq = first_seq + i_owner
    seq_len = gl.load(p_seq_lens + i_seq)
    i_first_token = gl.load(p_query_starts + i_seq)
    num_tokens = gl.load(p_query_starts + i_seq + 1) - i_first_token
    i_begin = (i_entry - gl.load(p_starts + i_owner)) * tokens
    first_position = seq_len - num_tokens + i_begin
    last_position = seq_len - num_tokens + gl.minimum(i_begin + tokens, num_tokens) - 1
    return i_item % NUM_KV_HEADS, i_seq, i_first_token, num_tokens, i_begin, first_position, last_position


@gluon.jit
def _produce(
    p_k, p_v, p_tables, p_seq_lens, p_query_starts, p_starts, p_owners, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    num_rounds, count, i_program, num_programs, first_seq, stride_block, stride_slot, stride_head, stride_table,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_SIZE: gl.constexpr, BLOCK_M: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fills the rings with all tiles of all items, K before V."""
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    i_d = gl.arange(0, D, layout=gl.SliceLayout(0, copy))
    i_ring = num_rounds * 0
    for i_round in range(num_rounds):
        i_kv_head, i_seq, _, _, _, _, last_position = _item(
            i_round, count, i_program, num_programs, p_seq_lens, p_query_starts, p_starts, p_owners, first_seq,
            NUM_KV_HEADS, GROUP, BLOCK_M,
        )  # fmt: skip
        p_k_row = p_k + i_kv_head.to(gl.int64) * stride_head + i_d[None, :]
        p_v_row = p_v + i_kv_head.to(gl.int64) * stride_head + i_d[None, :]
        p_table = p_tables + i_seq.to(gl.int64) * stride_table
        end = last_position + 1
        o_rows = _look_up(p_table, 0, end, stride_block, stride_slot, BLOCK_SIZE, TILE, copy)
        for i_tile in range((end + TILE - 1) // TILE):
            i_slot = i_ring % STAGES
            # A barrier that nobody has passed counts as past the phase before its first.
            phase = ((i_ring // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(i_slot), phase)
            _start_copy(k_ring.index(i_slot), p_k_row, o_rows)
            async_copy.mbarrier_arrive(k_full.index(i_slot), increment_count=False)
            o_next = _look_up(p_table, (i_tile + 1) * TILE, end, stride_block, stride_slot, BLOCK_SIZE, TILE, copy)
            mbarrier.wait(v_empty.index(i_slot), phase)
            _start_copy(v_ring.index(i_slot), p_v_row, o_rows)
            async_copy.mbarrier_arrive(v_full.index(i_slot), increment_count=False)
            o_rows = o_next
            i_ring += 1
    # Shared memory must outlive what is written to it.
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def _take_turn(turns, i_now, HALF: gl.constexpr):
    """Waits until the other half has started its products of the tile before (half 1: of this tile)."""
    mbarrier.wait(turns.index(HALF), (i_now & 1) ^ 1 if HALF == 0 else i_now & 1)


@gluon.jit
def _walk(
    b_out, b_p16, b_max, b_sum, b_q, b_position, k_ring, v_ring, k_full, k_empty, v_full, v_empty, turns,
    first, last, i_ring, qk_scale, HALF: gl.constexpr, TURNS: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Tiles [first, last), first > 0, of an item whose tile 0 is the ring's i_ring-th.

    Enters and leaves with the probabilities of the tile before not yet multiplied by its V, which is there.
    """
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    outputs: gl.constexpr = b_out.type.layout
    for i_tile in range(first, last):
        i_now = i_ring + i_tile
        i_slot = i_now % STAGES
        i_before = (i_now - 1) % STAGES
        mbarrier.wait(k_full.index(i_slot), (i_now // STAGES) & 1)
        fence_async_shared()
        if TURNS:
            _take_turn(turns, i_now, HALF)
        b_zero = gl.zeros([64, TILE], gl.float32, scores)
        b_score = warpgroup_mma(b_q, k_ring.index(i_slot).permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_out = warpgroup_mma(b_p16, v_ring.index(i_before), b_out, is_async=True)
        if TURNS:
            mbarrier.arrive(turns.index(1 - HALF))
        b_score = warpgroup_mma_wait(1, deps=(b_score,))
        # All warps of the group have read it, not only the one that says so.
        _barrier()
        mbarrier.arrive(k_empty.index(i_slot))
        b_p, b_max, b_sum, b_decay = _softmax(b_score, b_max, b_sum, b_position, i_tile * TILE, qk_scale, TILE, MASKED)
        b_next16 = gl.convert_layout(b_p.to(b_p16.dtype), gl.DotOperandLayout(0, outputs, 2))
        # V is waited for here, and not where it is read, because the assembler moves no arithmetic across this loop: between two
        # products alone it would put most of the softmax behind the second.
        mbarrier.wait(v_full.index(i_slot), (i_now // STAGES) & 1)
        fence_async_shared()
        b_out = warpgroup_mma_wait(0, deps=(b_out,))
        _barrier()
        mbarrier.arrive(v_empty.index(i_before))
        b_out = b_out * gl.convert_layout(b_decay, gl.SliceLayout(1, outputs))[:, None]
        b_p16 = b_next16
    return b_out, b_p16, b_max, b_sum


@gluon.jit
def _addresses(
    i_kv_head, i_first_token, num_tokens, i_begin,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, HALF: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Of each row of a half: (its token in the batch, its query head, whether it is one). All [64]."""
    i_m = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    i_token = i_begin + i_m // GROUP
    m_row = (i_m < BLOCK_M // GROUP * GROUP) & (i_token < num_tokens)
    return (i_first_token + i_token).to(gl.int64), i_kv_head * GROUP + i_m % GROUP, m_row


@gluon.jit
def _consume(
    p_out, p_q, p_seq_lens, p_query_starts, p_starts, p_owners, q_tiles, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    turns, num_rounds, count, i_program, num_programs, first_seq, qk_scale, stride_q_token, stride_q_head,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, TILE: gl.constexpr,
    STAGES: gl.constexpr, Q_IN_REGISTERS: gl.constexpr, TURNS: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Rows [64 HALF, 64 HALF + 64) of all items, from the load of Q to the store."""
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    i_d = gl.arange(0, D, layout=gl.SliceLayout(0, rows))
    i_row = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, scores))
    q_tile = q_tiles.index(HALF)
    i_ring = num_rounds * 0
    for i_round in range(num_rounds):
        i_kv_head, _, i_first_token, num_tokens, i_begin, first_position, last_position = _item(
            i_round, count, i_program, num_programs, p_seq_lens, p_query_starts, p_starts, p_owners, first_seq,
            NUM_KV_HEADS, GROUP, BLOCK_M,
        )  # fmt: skip
        # Tile 0 is always masked, tiles [1, whole_to) are seen by every row, the others cross the diagonal.
        num_tiles = (last_position + TILE) // TILE
        whole_to = gl.maximum((first_position + 1) // TILE, 1)
        o_token, i_head, m_row = _addresses(i_kv_head, i_first_token, num_tokens, i_begin, GROUP, BLOCK_M, HALF, rows)
        p_q_tile = p_q + o_token[:, None] * stride_q_token + i_head[:, None] * stride_q_head + i_d[None, :]
        q_tile.store(gl.load(p_q_tile, mask=m_row[:, None], other=0.0))
        if Q_IN_REGISTERS:
            b_q = q_tile.load(gl.DotOperandLayout(0, scores, 2))
        else:
            b_q = q_tile
            fence_async_shared()
            _barrier()
        # Rows that pad the tile follow the last token, so that they see something and stay finite.
        b_position = gl.minimum(first_position + i_row // GROUP, last_position)

        b_out = gl.zeros([64, D], gl.float32, outputs)
        b_max = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
        b_sum = gl.zeros([64], gl.float32, gl.SliceLayout(1, scores))
        i_slot = i_ring % STAGES
        mbarrier.wait(k_full.index(i_slot), (i_ring // STAGES) & 1)
        fence_async_shared()
        if TURNS:
            _take_turn(turns, i_ring, HALF)
        b_score = gl.zeros([64, TILE], gl.float32, scores)
        b_score = warpgroup_mma(b_q, k_ring.index(i_slot).permute((1, 0)), b_score, use_acc=False, is_async=True)
        if TURNS:
            mbarrier.arrive(turns.index(1 - HALF))
        b_score = warpgroup_mma_wait(0, deps=(b_score,))
        _barrier()
        mbarrier.arrive(k_empty.index(i_slot))
        b_p, b_max, b_sum, _ = _softmax(b_score, b_max, b_sum, b_position, 0, qk_scale, TILE, True)
        b_p16 = gl.convert_layout(b_p.to(q_tile.dtype), gl.DotOperandLayout(0, outputs, 2))
        mbarrier.wait(v_full.index(i_slot), (i_ring // STAGES) & 1)
        fence_async_shared()
        b_out, b_p16, b_max, b_sum = _walk(
            b_out, b_p16, b_max, b_sum, b_q, b_position, k_ring, v_ring, k_full, k_empty, v_full, v_empty, turns,
            1, whole_to, i_ring, qk_scale, HALF, TURNS, TILE, STAGES, False,
        )  # fmt: skip
        b_out, b_p16, b_max, b_sum = _walk(
            b_out, b_p16, b_max, b_sum, b_q, b_position, k_ring, v_ring, k_full, k_empty, v_full, v_empty, turns,
            whole_to, num_tiles, i_ring, qk_scale, HALF, TURNS, TILE, STAGES, True,
        )  # fmt: skip
        i_ring += num_tiles
        i_slot = (i_ring - 1) % STAGES
        b_out = warpgroup_mma(b_p16, v_ring.index(i_slot), b_out, is_async=True)
        # Found out once more, and not kept: registers are short in the loops.
        i_kv_head, _, i_first_token, num_tokens, i_begin, _, _ = _item(
            i_round, count, i_program, num_programs, p_seq_lens, p_query_starts, p_starts, p_owners, first_seq,
            NUM_KV_HEADS, GROUP, BLOCK_M,
        )  # fmt: skip
        o_token, i_head, m_row = _addresses(i_kv_head, i_first_token, num_tokens, i_begin, GROUP, BLOCK_M, HALF, rows)
        b_out = warpgroup_mma_wait(0, deps=(b_out,))
        _barrier()
        mbarrier.arrive(v_empty.index(i_slot))
        b_out = b_out / gl.convert_layout(b_sum, gl.SliceLayout(1, outputs))[:, None]
        o_row = o_token * (NUM_KV_HEADS * GROUP) + i_head
        # Through the memory of Q, which nobody reads any more: whole rows are stored.
        q_tile.store(b_out.to(q_tile.dtype))
        gl.store(p_out + o_row[:, None] * D + i_d[None, :], q_tile.load(rows), mask=m_row[:, None])


@gluon.jit(do_not_specialize=["num_seqs", "first_seq", "stride_table"])
def prefill_split_kernel(
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
    Q_IN_REGISTERS: gl.constexpr,
    TURNS: gl.constexpr,
):
    """As `paged_prefill.prefill_kernel` without a window, for 4 warps, which Gluon makes 12, and BLOCK_M 128.

    An item is an entry of the list for one KV head; a grid of any size takes all of them. STAGES: tiles in each ring.
    Q_IN_REGISTERS spares shared memory's bandwidth and takes a quarter of D registers. TURNS: the groups start products in turn.
    """
    dtype: gl.constexpr = p_q.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    count = gl.load(p_starts + num_seqs)
    i_program = gl.program_id(0)
    num_programs = gl.num_programs(0)
    full_rounds = count * NUM_KV_HEADS // num_programs
    place = gl.where(full_rounds % 2 == 0, i_program, num_programs - 1 - i_program)
    num_rounds = full_rounds + (place < count * NUM_KV_HEADS - full_rounds * num_programs).to(gl.int32)

    q_tiles = gl.allocate_shared_memory(dtype, [2, 64, D], shared)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], shared)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], shared)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], barriers)
    for i_half in gl.static_range(2):
        mbarrier.init(turns.index(i_half), count=1)
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
                k_full, k_empty, v_full, v_empty, turns, num_rounds, count, i_program, num_programs, first_seq,
                qk_scale, stride_q_token, stride_q_head, NUM_KV_HEADS, GROUP, D, BLOCK_M, TILE, STAGES, Q_IN_REGISTERS, TURNS, 0,
            )),
            (_consume, (
                p_out, p_q, p_seq_lens, p_query_starts, p_starts, p_owners, q_tiles, k_ring, v_ring,
                k_full, k_empty, v_full, v_empty, turns, num_rounds, count, i_program, num_programs, first_seq,
                qk_scale, stride_q_token, stride_q_head, NUM_KV_HEADS, GROUP, D, BLOCK_M, TILE, STAGES, Q_IN_REGISTERS, TURNS, 1,
            )),
            (_produce, (
                p_k, p_v, p_tables, p_seq_lens, p_query_starts, p_starts, p_owners, k_ring, v_ring,
                k_full, k_empty, v_full, v_empty, num_rounds, count, i_program, num_programs, first_seq,
                stride_block, stride_slot, stride_head, stride_table, NUM_KV_HEADS, GROUP, D, BLOCK_SIZE, BLOCK_M, TILE, STAGES,
            )),
        ],
        [4, 4],
        [208, 88],
    )  # fmt: skip
