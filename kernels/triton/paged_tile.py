"""One program's walk over a range of paged context: the online softmax that the decode and the prefill kernel share.

Scores live in base 2 (`qk_scale` = scale * log2 e), so that the exponential is one instruction. A range is walked in
order, tile by tile from an absolute position, so a row's sums do not depend on anything outside its sequence.
"""

import triton
import triton.language as tl


@triton.jit
def attend_range(
    b_out,
    b_max,
    b_sum,
    b_q,
    b_position,
    p_k,
    p_v,
    p_table,
    begin,
    end,
    valid_from,
    stride_block,
    stride_slot,
    qk_scale,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DOT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds softmax(q K^T) V over positions [begin, end) to (b_out, b_max, b_sum), unnormalised; begin is a multiple of TILE.

    MASKED hides, row by row, what comes after `b_position` or before its window, and reads only [valid_from, end): slots
    outside may hold anything. Unmasked, every row sees every position and `end` is a multiple of TILE.
    """
    i_d = tl.arange(0, D_PAD)
    m_d = i_d < D
    # The ends of a range are a tile or two: filling a pipeline for them costs registers and gains nothing. Not so in
    # float32, whose products read operands from shared memory, where the pipeline puts them.
    stages: tl.constexpr = 1 if MASKED and tl.float32 != DOT else None
    for i_start in tl.range(begin, end, TILE, num_stages=stages):
        i_n = i_start + tl.arange(0, TILE)
        m_n = (i_n < end) & (i_n >= valid_from)
        if BLOCK_SIZE % TILE == 0:
            # The tile lies in one block: one scalar look-up, and addresses that the compiler sees through.
            i_block = tl.load(p_table + i_start // BLOCK_SIZE).to(tl.int64)
            o_n = i_block * stride_block + (i_start % BLOCK_SIZE + tl.arange(0, TILE)) * stride_slot
        else:
            if MASKED:
                i_block = tl.load(p_table + i_n // BLOCK_SIZE, mask=m_n, other=0).to(tl.int64)  # [TILE]
            else:
                i_block = tl.load(p_table + i_n // BLOCK_SIZE).to(tl.int64)
            o_n = i_block * stride_block + (i_n % BLOCK_SIZE) * stride_slot
        p_k_tile = p_k + o_n[None, :] + i_d[:, None]  # [D_PAD, TILE]
        p_v_tile = p_v + o_n[:, None] + i_d[None, :]  # [TILE, D_PAD]
        if MASKED:
            b_k = tl.load(p_k_tile, mask=m_d[:, None] & m_n[None, :], other=0.0)
            b_v = tl.load(p_v_tile, mask=m_n[:, None] & m_d[None, :], other=0.0)
        elif D == D_PAD:
            b_k = tl.load(p_k_tile)
            b_v = tl.load(p_v_tile)
        else:
            b_k = tl.load(p_k_tile, mask=m_d[:, None], other=0.0)
            b_v = tl.load(p_v_tile, mask=m_d[None, :], other=0.0)
        b_score = tl.dot(b_q, b_k.to(DOT), input_precision="ieee")  # [BLOCK_M, D_PAD] x [D_PAD, TILE]
        if MASKED:
            m_seen = (i_n[None, :] <= b_position[:, None]) & m_n[None, :]
            if WINDOW > 0:
                m_seen &= i_n[None, :] > b_position[:, None] - WINDOW
            b_score = tl.where(m_seen, b_score, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_score, 1) * qk_scale)  # [BLOCK_M]
        b_shift = b_new_max
        if MASKED:
            # A row that has seen nothing yet must not subtract infinity from infinity.
            b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_score * qk_scale - b_shift[:, None])  # [BLOCK_M, TILE]
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_out = tl.dot(
            b_p.to(DOT), b_v.to(DOT), b_out * b_decay[:, None], input_precision="ieee"
        )  # [BLOCK_M, TILE] x [TILE, D_PAD]
        b_max = b_new_max
    return b_out, b_max, b_sum
