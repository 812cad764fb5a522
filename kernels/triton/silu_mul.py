"""SiLU·mul, the gate of a Llama MLP. Twin of `kernels.reference.silu_mul`, rounded once. Elementwise: no row sees another."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import tuning
from kernels.triton.dependent_launch import after_the_kernel_before


@triton.jit
def silu_mul_kernel(p_out, p_gate_up, width, stride_row, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """out = gate / (1 + exp(-gate)) * up, in float32; gate_up rows are `stride_row` apart, out is contiguous."""
    i_row = tl.program_id(0).to(tl.int64)
    i_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = i_column < width
    after_the_kernel_before(DEPENDENT)
    p_gate = p_gate_up + i_row * stride_row + i_column
    b_gate = tl.load(p_gate, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_up = tl.load(p_gate + width, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_out = b_gate * tl.sigmoid(b_gate) * b_up
    tl.store(p_out + i_row * width + i_column, b_out.to(p_out.dtype.element_ty), mask=m)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. gate_up: [T, 2 * I], gate first, rows may be strided; out: [T, I], contiguous, in its dtype.

    Raises ValueError for elements of a row that are not contiguous.
    """
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.stride(-1) != 1:
        raise ValueError("silu_mul wants rows whose elements are contiguous")
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows and width:
        grid = (num_rows, triton.cdiv(width, tuning.SILU_MUL_BLOCK))
        silu_mul_kernel[grid](
            out,
            gate_up,
            width,
            gate_up.stride(0),
            BLOCK=tuning.SILU_MUL_BLOCK,
            num_warps=tuning.SILU_MUL_WARPS,
            **tuning.layer_options(gate_up.device),
        )
    return out
