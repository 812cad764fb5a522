"""Decode attention over a paged cache, split along the context; one new token a sequence.

A persistent grid strides a work list of (sequence, split, KV head). Splits have a fixed length and absolute borders, so
a row's result is a function of its own query, context and window alone: bit for bit the same whatever else is in the
batch (Flash-Decoding, Dao et al. 2023, with the split size, not the split count, fixed). A sequence with one split is
written at once; the others leave float32 partial results that `merge_kernel` joins in order.
"""

import triton
import triton.language as tl

from kernels.triton.dependent_launch import after_the_kernel_before
from kernels.triton.paged_tile import attend_range


@triton.jit(do_not_specialize=["num_seqs", "stride_table"])
def decode_kernel(
    p_out,
    p_partial,
    p_partial_max,
    p_partial_sum,
    p_q,
    p_k,
    p_v,
    p_tables,
    p_seq_lens,
    p_starts,
    p_owners,
    num_seqs,
    qk_scale,
    stride_q_token,
    stride_q_head,
    stride_block,
    stride_slot,
    stride_head,
    stride_table,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    DOT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out[s, h] = softmax(scale q K^T) V, or split by split its unnormalised sum, maximum and weight.

    Entry e of the list is split `e - starts[owners[e]]` of sequence owners[e]; partial: [entries, Hq, D] float32, its
    maxima and sums [entries, Hq]. Row r of a tile is query head `kv_head * GROUP + r`.
    """
    i_m = tl.arange(0, BLOCK_M)
    i_d = tl.arange(0, D_PAD)
    m_row = i_m < GROUP
    m_q = m_row[:, None] & (i_d < D)[None, :]
    after_the_kernel_before(DEPENDENT)
    num_items = tl.load(p_starts + num_seqs) * NUM_KV_HEADS
    for i_item in tl.range(tl.program_id(0), num_items, tl.num_programs(0)):
        i_entry = i_item // NUM_KV_HEADS
        i_kv_head = i_item % NUM_KV_HEADS
        i_seq = tl.load(p_owners + i_entry).to(tl.int64)
        i_first_entry = tl.load(p_starts + i_seq)
        num_splits = tl.load(p_starts + i_seq + 1) - i_first_entry
        seq_len = tl.load(p_seq_lens + i_seq)
        seen_from = tl.maximum(seq_len - WINDOW, 0) if WINDOW > 0 else 0
        i_split = seen_from // SPLIT + i_entry - i_first_entry
        end = tl.minimum((i_split + 1) * SPLIT, seq_len)

        i_head = i_kv_head * GROUP + i_m
        b_q = tl.load(p_q + i_seq * stride_q_token + i_head[:, None] * stride_q_head + i_d[None, :], mask=m_q, other=0.0)
        b_q = b_q.to(DOT)  # [BLOCK_M, D_PAD]
        b_position = tl.full([BLOCK_M], 0, tl.int32) + (seq_len - 1)
        b_out = tl.zeros([BLOCK_M, D_PAD], tl.float32)
        b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        p_k_head = p_k + i_kv_head.to(tl.int64) * stride_head
        p_v_head = p_v + i_kv_head.to(tl.int64) * stride_head
        p_table = p_tables + i_seq * stride_table

        # Masks are paid for at the ends only: [begin, whole_from) the window's border, then whole tiles, then the tail.
        begin = i_split * SPLIT
        whole_from = begin
        if WINDOW > 0:
            begin = tl.maximum(begin, seen_from // TILE * TILE)
            whole_from = tl.where(begin < seen_from, tl.minimum(begin + TILE, end), begin)
            b_out, b_max, b_sum = attend_range(
                b_out, b_max, b_sum, b_q, b_position, p_k_head, p_v_head, p_table, begin, whole_from, seen_from,
                stride_block, stride_slot, qk_scale, WINDOW, BLOCK_SIZE, TILE, D, D_PAD, DOT, True,
            )  # fmt: skip
        whole_to = tl.maximum(whole_from, end // TILE * TILE)
        b_out, b_max, b_sum = attend_range(
            b_out, b_max, b_sum, b_q, b_position, p_k_head, p_v_head, p_table, whole_from, whole_to, 0,
            stride_block, stride_slot, qk_scale, WINDOW, BLOCK_SIZE, TILE, D, D_PAD, DOT, False,
        )  # fmt: skip
        b_out, b_max, b_sum = attend_range(
            b_out, b_max, b_sum, b_q, b_position, p_k_head, p_v_head, p_table, whole_to, end, 0,
            stride_block, stride_slot, qk_scale, WINDOW, BLOCK_SIZE, TILE, D, D_PAD, DOT, True,
        )  # fmt: skip

        if num_splits == 1:
            o_row = i_seq * (NUM_KV_HEADS * GROUP) + i_head
            b_final = b_out / b_sum[:, None]
            tl.store(p_out + o_row[:, None] * D + i_d[None, :], b_final.to(p_out.dtype.element_ty), mask=m_q)
        else:
            o_row = i_entry.to(tl.int64) * (NUM_KV_HEADS * GROUP) + i_head
            tl.store(p_partial + o_row[:, None] * D + i_d[None, :], b_out, mask=m_q)
            tl.store(p_partial_max + o_row, b_max, mask=m_row)
            tl.store(p_partial_sum + o_row, b_sum, mask=m_row)


@triton.jit
def merge_kernel(
    p_out,
    p_partial,
    p_partial_max,
    p_partial_sum,
    p_starts,
    NUM_Q_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out[s, h] = sum_i 2^(max_i - max) partial_i / sum_i 2^(max_i - max) sum_i over the splits of a sequence that has several."""
    i_seq = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1)
    i_d = tl.arange(0, D_PAD)
    m_d = i_d < D
    after_the_kernel_before(DEPENDENT)
    begin = tl.load(p_starts + i_seq)
    end = tl.load(p_starts + i_seq + 1)
    if end - begin > 1:
        b_out = tl.zeros([D_PAD], tl.float32)
        # The first split is never empty, so its maximum is finite and no difference below is between infinities.
        top = tl.load(p_partial_max + begin.to(tl.int64) * NUM_Q_HEADS + i_head)
        total = 0.0
        for i_start in tl.range(begin, end, SPLITS):
            i_split = i_start + tl.arange(0, SPLITS)
            m_split = i_split < end
            o_row = i_split.to(tl.int64) * NUM_Q_HEADS + i_head
            b_max = tl.load(p_partial_max + o_row, mask=m_split, other=float("-inf"))  # [SPLITS]
            b_sum = tl.load(p_partial_sum + o_row, mask=m_split, other=0.0)
            b_part = tl.load(p_partial + o_row[:, None] * D + i_d[None, :], mask=m_split[:, None] & m_d[None, :], other=0.0)
            new_top = tl.maximum(top, tl.max(b_max, 0))
            b_weight = tl.exp2(b_max - new_top)  # [SPLITS]
            decay = tl.exp2(top - new_top)
            total = total * decay + tl.sum(b_sum * b_weight, 0)
            b_out = b_out * decay + tl.sum(b_part * b_weight[:, None], 0)  # [SPLITS, D_PAD] over splits
            top = new_top
        o_out = (i_seq * NUM_Q_HEADS + i_head) * D
        tl.store(p_out + o_out + i_d, (b_out / total).to(p_out.dtype.element_ty), mask=m_d)
