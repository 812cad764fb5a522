"""Rotary embedding of q and k and the write of k and v into the paged cache, in one launch.

Twin of `kernels.reference.rotary_kv_write`; rotates in float32 with unrounded cosines, and rounds once. One program holds
some heads of one token: no token sees another. Nothing is written for slot -1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import tuning
from kernels.triton.dependent_launch import after_the_kernel_before


@triton.jit
def _rotate(p_x, p_cos_sin, m, i_half, HALF: tl.constexpr):
    """(x1 cos - x2 sin, x2 cos + x1 sin) of `[heads, HALF]` halves; p_x points at x1."""
    b_cos = tl.load(p_cos_sin + i_half, mask=i_half < HALF, other=0.0)[None, :]  # [1, HALF_PAD]
    b_sin = tl.load(p_cos_sin + HALF + i_half, mask=i_half < HALF, other=0.0)[None, :]
    b_first = tl.load(p_x, mask=m, other=0.0).to(tl.float32)  # [HEADS, HALF_PAD]
    b_second = tl.load(p_x + HALF, mask=m, other=0.0).to(tl.float32)
    return b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin


@triton.jit
def rotary_kv_write_kernel(
    p_out,
    p_q,
    p_k,
    p_v,
    p_cos_sin,
    p_positions,
    p_k_cache,
    p_v_cache,
    p_slots,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_cos_sin,
    stride_block,
    stride_slot,
    stride_head,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out = R(position) q; k_cache[slot] = R(position) k; v_cache[slot] = v. Axis 1: blocks of query heads, then of KV heads."""
    i_token = tl.program_id(0).to(tl.int64)
    i_part = tl.program_id(1)
    i_half = tl.arange(0, HALF_PAD)
    num_q_parts: tl.constexpr = (NUM_Q_HEADS + HEADS - 1) // HEADS
    after_the_kernel_before(DEPENDENT)
    p_angles = p_cos_sin + tl.load(p_positions + i_token) * stride_cos_sin
    if i_part < num_q_parts:
        i_head = i_part * HEADS + tl.arange(0, HEADS)
        m = (i_head < NUM_Q_HEADS)[:, None] & (i_half < HALF)[None, :]
        p_x = p_q + i_token * stride_q_token + i_head[:, None] * stride_q_head + i_half[None, :]
        b_first, b_second = _rotate(p_x, p_angles, m, i_half, HALF)
        p_to = p_out + (i_token * NUM_Q_HEADS + i_head[:, None]) * (2 * HALF) + i_half[None, :]
        tl.store(p_to, b_first.to(p_out.dtype.element_ty), mask=m)
        tl.store(p_to + HALF, b_second.to(p_out.dtype.element_ty), mask=m)
    else:
        i_slot = tl.load(p_slots + i_token)
        if i_slot >= 0:
            i_head = (i_part - num_q_parts) * HEADS + tl.arange(0, HEADS)
            m = (i_head < NUM_KV_HEADS)[:, None] & (i_half < HALF)[None, :]
            o_cache = (i_slot // BLOCK_SIZE) * stride_block + (i_slot % BLOCK_SIZE) * stride_slot
            o_to = o_cache + i_head[:, None] * stride_head + i_half[None, :]
            p_x = p_k + i_token * stride_k_token + i_head[:, None] * stride_k_head + i_half[None, :]
            b_first, b_second = _rotate(p_x, p_angles, m, i_half, HALF)
            tl.store(p_k_cache + o_to, b_first.to(p_k_cache.dtype.element_ty), mask=m)
            tl.store(p_k_cache + o_to + HALF, b_second.to(p_k_cache.dtype.element_ty), mask=m)
            p_x = p_v + i_token * stride_v_token + i_head[:, None] * stride_v_head + i_half[None, :]
            b_first, b_second = tl.load(p_x, mask=m), tl.load(p_x + HALF, mask=m)  # [HEADS, HALF_PAD]
            tl.store(p_v_cache + o_to, b_first.to(p_v_cache.dtype.element_ty), mask=m)
            tl.store(p_v_cache + o_to + HALF, b_second.to(p_v_cache.dtype.element_ty), mask=m)


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
    """Rotates q and k, writes k and v into the cache, returns the rotated q as a new contiguous tensor.

    q: [T, Hq, D]; k, v: [T, Hkv, D], heads and tokens may be strided (views of one QKV product); cos_sin: [positions, D]
    float32; positions, slot_mapping: [T] int64; caches: [num_blocks, block_size, Hkv, D] of equal strides.
    Raises ValueError for elements of a head that are not contiguous, or caches that differ in strides.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if any(x.stride(-1) != 1 for x in (q, k, v, cos_sin, k_cache)) or k_cache.stride() != v_cache.stride():
        raise ValueError("rotary_kv_write wants contiguous elements of a head, and K and V caches of equal strides")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    heads = min(tuning.ROTARY_HEADS, triton.next_power_of_2(max(num_q_heads, num_kv_heads)))
    half = head_dim // 2
    rotary_kv_write_kernel[(num_tokens, triton.cdiv(num_q_heads, heads) + triton.cdiv(num_kv_heads, heads))](
        out,
        q,
        k,
        v,
        cos_sin,
        positions,
        k_cache,
        v_cache,
        slot_mapping,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        cos_sin.stride(0),
        *k_cache.stride()[:3],
        NUM_Q_HEADS=num_q_heads,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=k_cache.shape[1],
        HALF=half,
        HALF_PAD=triton.next_power_of_2(half),
        HEADS=heads,
        num_warps=tuning.ROTARY_WARPS,
        **tuning.layer_options(q.device),
    )
    return out
