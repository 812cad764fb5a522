"""RMSNorm, alone and with the residual addition in front, one read and one write of each element.

Twin of `kernels.reference.rms_norm` and `add_rms_norm`: sums in float32, rounded once before the weight as there.
Every row is computed alone and in one order, so results do not depend on the other rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import tuning
from kernels.triton.dependent_launch import after_the_kernel_before


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    p_out,
    p_total,
    p_x,
    p_residual,
    p_weight,
    num_rows,
    width,
    stride_x,
    stride_residual,
    eps,
    ADD: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out = round(s / sqrt(mean(s^2) + eps)) * weight, s = x (+ residual, rounded, stored in total); out and total contiguous."""
    i_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_column = tl.arange(0, WIDTH)
    m_row = (i_row < num_rows)[:, None]
    m = m_row & (i_column < width)[None, :]
    o_out = i_row[:, None] * width + i_column[None, :]
    dtype = p_out.dtype.element_ty
    # The weight need not wait; a long row leaves no registers for it.
    early: tl.constexpr = DEPENDENT and WIDTH <= 8192
    if early:
        b_weight = tl.load(p_weight + i_column, mask=i_column < width, other=0.0).to(tl.float32)  # [WIDTH]
    after_the_kernel_before(DEPENDENT)
    b_x = tl.load(p_x + i_row[:, None] * stride_x + i_column[None, :], mask=m, other=0.0).to(tl.float32)  # [ROWS, WIDTH]
    if ADD:
        o_residual = i_row[:, None] * stride_residual + i_column[None, :]
        b_x += tl.load(p_residual + o_residual, mask=m, other=0.0).to(tl.float32)
        b_total = b_x.to(dtype)
        tl.store(p_total + o_out, b_total, mask=m)
        b_x = b_total.to(tl.float32)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / width + eps)  # [ROWS]
    if not early:
        b_weight = tl.load(p_weight + i_column, mask=i_column < width, other=0.0).to(tl.float32)
    b_normed = (b_x * b_scale[:, None]).to(dtype).to(tl.float32)
    tl.store(p_out + o_out, (b_normed * b_weight[None, :]).to(dtype), mask=m)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    num_rows, width = x.shape
    if width > tuning.MAX_NORM_WIDTH:
        raise ValueError(
            f"a row of {width} elements is above {tuning.MAX_NORM_WIDTH}, the most that rms_norm keeps in registers"
        )
    if x.stride(-1) != 1 or (residual is not None and residual.stride(-1) != 1):
        raise ValueError("rms_norm wants rows whose elements are contiguous")
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    if num_rows:
        padded = triton.next_power_of_2(width)
        rows, warps = tuning.norm_shape(padded)
        rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
            out,
            total,
            x,
            x if residual is None else residual,
            weight,
            num_rows,
            width,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            ADD=residual is not None,
            ROWS=rows,
            WIDTH=padded,
            num_warps=warps,
            **tuning.layer_options(x.device),
        )
    return out, total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight. x: [T, H], rows may be strided; weight: [H]; out: [T, H], contiguous, in x's dtype.

    Raises ValueError for H above 32,768 or elements of a row that are not contiguous.
    """
    return _launch(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = x + residual rounded to their dtype. All [T, H]; both results are new. Raises as `rms_norm`."""
    return _launch(x, residual, weight, eps)
