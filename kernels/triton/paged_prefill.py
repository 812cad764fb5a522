"""Prefill attention over a paged cache: chunks of several tokens after any context, causal, grouped heads packed in rows.

One program takes a run of tokens of one sequence and all query heads of one KV head, so that a KV tile is read once for
the group. Its rows are computed alone and in one order: results do not depend on other sequences of the batch. They
may differ in the last bits from those of the decode kernel, which sums in splits.
"""

import triton
import triton.language as tl

from kernels.triton.dependent_launch import after_the_kernel_before
from kernels.triton.paged_tile import attend_range


@triton.jit(do_not_specialize=["num_seqs", "first_seq", "stride_table"])
def prefill_kernel(
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
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    DOT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out[t, h] = softmax(scale q K^T + causal mask) V for BLOCK_M // GROUP tokens of a chunk.

    Row r of a tile is query head `kv_head * GROUP + r % GROUP` of token `r // GROUP`. The list's
    sequence 0 is row `first_seq` of the tables and lengths. Axis 0 may be longer than the list: surplus programs return.
    """
    after_the_kernel_before(DEPENDENT)
    # The last tokens see the longest context: they start first, so that the grid's tail is made of short programs.
    i_entry = tl.load(p_starts + num_seqs) - 1 - tl.program_id(0)
    if i_entry < 0:
        return
    i_kv_head = tl.program_id(1)
    i_owner = tl.load(p_owners + i_entry)
    i_seq = (first_seq + i_owner).to(tl.int64)
    tokens: tl.constexpr = BLOCK_M // GROUP
    seq_len = tl.load(p_seq_lens + i_seq)
    i_first_token = tl.load(p_query_starts + i_seq)
    num_tokens = tl.load(p_query_starts + i_seq + 1) - i_first_token
    i_begin = (i_entry - tl.load(p_starts + i_owner)) * tokens
    first_position = seq_len - num_tokens + i_begin
    last_position = seq_len - num_tokens + tl.minimum(i_begin + tokens, num_tokens) - 1

    i_m = tl.arange(0, BLOCK_M)
    i_d = tl.arange(0, D_PAD)
    i_token = i_begin + i_m // GROUP
    i_head = i_kv_head * GROUP + i_m % GROUP
    m_row = (i_m < tokens * GROUP) & (i_token < num_tokens)
    m_q = m_row[:, None] & (i_d < D)[None, :]
    # Rows that pad the tile follow the last token, so that they see something and stay finite.
    b_position = tl.minimum(seq_len - num_tokens + i_token, last_position)
    o_token = (i_first_token + i_token).to(tl.int64)
    p_q_tile = p_q + o_token[:, None] * stride_q_token + i_head[:, None] * stride_q_head + i_d[None, :]
    b_q = tl.load(p_q_tile, mask=m_q, other=0.0).to(DOT)  # [BLOCK_M, D_PAD]
    b_out = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    p_k_head = p_k + i_kv_head.to(tl.int64) * stride_head
    p_v_head = p_v + i_kv_head.to(tl.int64) * stride_head
    p_table = p_tables + i_seq * stride_table

    # [begin, whole_from) crosses some row's window, [whole_from, whole_to) is seen by every row, the rest crosses the diagonal.
    end = last_position + 1
    whole_from = 0
    if WINDOW > 0:
        seen_from = tl.maximum(first_position - WINDOW + 1, 0)
        begin = seen_from // TILE * TILE
        whole_from = tl.maximum(begin, tl.cdiv(tl.maximum(last_position - WINDOW + 1, 0), TILE) * TILE)
        b_out, b_max, b_sum = attend_range(
            b_out, b_max, b_sum, b_q, b_position, p_k_head, p_v_head, p_table, begin, tl.minimum(whole_from, end), seen_from,
            stride_block, stride_slot, qk_scale, WINDOW, BLOCK_SIZE, TILE, D, D_PAD, DOT, True,
        )  # fmt: skip
    whole_to = tl.maximum(whole_from, (first_position + 1) // TILE * TILE)
    b_out, b_max, b_sum = attend_range(
        b_out, b_max, b_sum, b_q, b_position, p_k_head, p_v_head, p_table, whole_from, whole_to, 0,
        stride_block, stride_slot, qk_scale, WINDOW, BLOCK_SIZE, TILE, D, D_PAD, DOT, False,
    )  # fmt: skip
    b_out, b_max, b_sum = attend_range(
        b_out, b_max, b_sum, b_q, b_position, p_k_head, p_v_head, p_table, whole_to, end, 0,
        stride_block, stride_slot, qk_scale, WINDOW, BLOCK_SIZE, TILE, D, D_PAD, DOT, True,
    )  # fmt: skip

    o_row = o_token * (NUM_KV_HEADS * GROUP) + i_head
    b_final = b_out / b_sum[:, None]
    tl.store(p_out + o_row[:, None] * D + i_d[None, :], b_final.to(p_out.dtype.element_ty), mask=m_q)
