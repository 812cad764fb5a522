"""Every tile size, warp count and pipeline depth of the Triton kernels, by architecture: the one file to change after a measurement.

Knows architectures and sizes, never tensors' contents. tests/bench/NOTES.md holds what each row is expected to give;
`make kernels` shows what each compiles to. Rows are keyed by the bytes of one head's padded row (head size rounded up to
a power of two, times the element size), because that, not the head size, decides shared memory and registers.
"""

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels. Triton reads the variable when a kernel is decorated, so it is read once here too."""

SPLIT_TOKENS = 512
"""Context tokens of one decode work item. Part of the arithmetic, not of the tuning: results change in the last bit with it,
so it is one constant for all batches, devices and head sizes. 512 keeps partial results at 1.6 % of the KV traffic."""

COMPILER_OPTIONS = {"enable_fp_fusion": True}
"""Given with every launch: multiply-adds are fused whatever Triton's version takes for granted (its default changes in 3.10)."""

DEPENDENT_LAUNCH = True
"""Whether the kernels of a layer come to the device before the kernel in front has ended, where it can (`dependent_launch`)."""

PROGRAMS_PER_MULTIPROCESSOR = 8
"""Programs of the persistent decode grid per multiprocessor. Enough that what is resident (1, 2 or 4, and by chance 3) leaves no tail:
with 4, of which 3 are resident, the last quarter starts when the others end, and a step's attention takes 7 % longer (H100)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One attention kernel's shape: `block_m` query rows (tokens x grouped heads) against `tile` context tokens an iteration.

    K and V are found through the block table, and Triton's pipeliner spends a stage group on that look-up: n tiles in
    flight need `num_stages` 2n + 1.
    """

    block_m: int
    tile: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTuning:
    """The two attention kernels' shapes."""

    decode: Tile
    prefill: Tile


def _row(decode: tuple[int, int, int], prefill: tuple[int, int, int, int]) -> AttentionTuning:
    tile, warps, stages = decode
    return AttentionTuning(
        decode=Tile(block_m=16, tile=tile, num_warps=warps, num_stages=stages),
        prefill=Tile(block_m=prefill[0], tile=prefill[1], num_warps=prefill[2], num_stages=prefill[3]),
    )


# architecture -> bytes of a padded row -> ((tile, warps, stages), (block_m, tile, warps, stages)) for 16-bit inputs
ATTENTION_16_BIT = {
    "sm_80": {
        128: _row((64, 4, 3), (128, 64, 8, 3)),
        256: _row((64, 4, 3), (128, 32, 8, 2)),
        512: _row((32, 4, 3), (32, 32, 4, 2)),
    },
    "sm_86": {
        128: _row((64, 4, 3), (64, 64, 4, 2)),
        256: _row((32, 4, 3), (128, 32, 8, 2)),
        512: _row((16, 4, 3), (32, 32, 4, 2)),
    },
    "sm_90": {
        128: _row((64, 4, 5), (128, 64, 8, 3)),
        256: _row((128, 4, 3), (128, 64, 8, 5)),
        512: _row((32, 4, 5), (64, 64, 8, 2)),
    },
    "sm_100": {
        128: _row((64, 4, 5), (128, 64, 8, 3)),
        256: _row((64, 4, 5), (128, 64, 8, 2)),
        512: _row((32, 4, 5), (64, 32, 8, 2)),
    },
    "gfx942": {
        128: _row((64, 4, 1), (64, 64, 4, 1)),
        256: _row((32, 4, 1), (64, 32, 4, 1)),
        512: _row((16, 4, 1), (64, 16, 8, 1)),
    },
}

HOPPER_PREFILL_HEAD_DIMS = (64, 128)
"""Head sizes whose prefill is `paged_prefill_hopper` on sm_90, in 16 bits and without a window."""

HOPPER_PREFILL_TILE, HOPPER_PREFILL_STAGES = 128, 2
"""Context tokens that it takes at once, and tiles of K and of V in shared memory."""

# 32-bit inputs multiply on the plain arithmetic units, for exactness: small tiles, whatever the architecture.
ATTENTION_32_BIT = {
    256: _row((32, 4, 2), (32, 16, 4, 2)),
    512: _row((16, 4, 2), (32, 16, 4, 2)),
    1024: _row((16, 8, 1), (16, 16, 8, 2)),
}

MAX_HEAD_DIM = 256
"""The largest head size that both tables above have a row for."""

SHARED_MEMORY_BYTES = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""What one program may use, by architecture (CUDA C++ programming guide, table of technical specifications; CDNA 3 ISA)."""

MERGE_SPLITS = 8
"""Partial results that the merge kernel reads at once."""

MERGE_WARPS = 1
ROTARY_HEADS = 8
"""Heads of one token that one program rotates and writes."""

ROTARY_WARPS = 4
SAMPLE_CHUNK = 4096
"""Logits of one program of the sampling kernels. Part of the arithmetic: sums are taken chunk by chunk."""

SAMPLE_WARPS = 8
LIMIT_TILE = 16384
"""Logits that the search for a row's top-k and top-p limits reads at once; one program reads the row over and over."""

LIMIT_WARPS = 32
SILU_MUL_BLOCK = 1024
SILU_MUL_WARPS = 4
NORM_TILE = 1024
"""Elements of one program of the norm when rows are short: it takes several rows."""

MAX_NORM_WIDTH = 1 << 15
"""Longest row that stays in one program's registers."""


def norm_shape(width: int) -> tuple[int, int]:
    """(rows of one program, warps) for rows of `width` elements padded to a power of two."""
    return max(1, NORM_TILE // width), min(32, max(4, width // 512))


def attention(architecture: str, padded_head_dim: int, element_bytes: int) -> AttentionTuning:
    """The row for one architecture; head sizes below the smallest row use that one. Raises ValueError above `MAX_HEAD_DIM`."""
    if padded_head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"head size {padded_head_dim} is above {MAX_HEAD_DIM}, the largest that the attention kernels are tuned for"
        )
    table = ATTENTION_32_BIT if element_bytes == 4 else ATTENTION_16_BIT[architecture]
    return table[max(padded_head_dim * element_bytes, min(table))]


@functools.cache
def architecture(device: torch.device) -> str:
    """The table's name for a device: the nearest one that has no more shared memory. The interpreter stands in for sm_90."""
    if INTERPRETING:
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    # Desktop parts (8.6, 8.9, 12.x) have 99 KiB a program, the data-centre parts of the same generation more.
    if (major, minor) in {(8, 0), (8, 7)}:
        return "sm_80"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_86")


def dependent(architecture_name: str) -> bool:
    """Whether kernels of a layer are compiled and launched as dependent ones."""
    return DEPENDENT_LAUNCH and not INTERPRETING and architecture_name in {"sm_90", "sm_100"}


@functools.cache
def layer_options(device: torch.device) -> dict[str, Any]:
    """What every launch of a layer's kernel is given."""
    is_dependent = dependent(architecture(device))
    # AMD's compiler knows no such option.
    return COMPILER_OPTIONS | {"DEPENDENT": is_dependent} | ({"launch_pdl": True} if is_dependent else {})


@functools.cache
def persistent_programs(device: torch.device) -> int:
    """Programs of a persistent grid on a device. Three in the interpreter, so that each takes several items."""
    if INTERPRETING:
        return 3
    return PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
