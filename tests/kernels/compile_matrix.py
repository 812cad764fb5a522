"""Every kernel with every row of kernels/triton/tuning.py, and what each compiles to, on a machine without a GPU.

A case holds the constants and pointer types of one launch; sizes and strides are taken as multiples of 16, as in serving.
Registers, stack and shared memory are read from the machine code with the disassembler of the Triton wheel.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from kernels.triton import tuning
from kernels.triton.paged_decode import decode_kernel, merge_kernel
from kernels.triton.paged_prefill import prefill_kernel
from kernels.triton.paged_prefill_hopper import LAUNCH, prefill_hopper_kernel
from kernels.triton.rms_norm import rms_norm_kernel
from kernels.triton.rotary_kv_write import rotary_kv_write_kernel
from kernels.triton.sampling import chunk_best_kernel, draw_kernel, limit_kernel, mass_kernel, row_best_kernel
from kernels.triton.silu_mul import silu_mul_kernel

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

_DOT = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}
_POINTERS = {
    "p_partial": "*fp32", "p_partial_max": "*fp32", "p_partial_sum": "*fp32", "p_tables": "*i32", "p_seq_lens": "*i32",
    "p_query_starts": "*i32", "p_starts": "*i32", "p_owners": "*i32", "p_cos_sin": "*fp32", "p_positions": "*i64", "p_slots": "*i64",
    "p_logits": "*fp32", "p_values": "*fp32", "p_best": "*fp32", "p_places": "*i32", "p_tokens": "*i64", "p_settings": "*i32",
    "p_numbers": "*fp64", "p_limits": "*i32", "p_masses": "*fp64",
}  # fmt: skip
_ANY_VALUE = {"num_seqs", "first_seq", "stride_table", "num_rows", "vocab", "num_chunks"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel with one set of constants; `label` tells cases of a kernel apart."""

    kernel: Any
    label: str
    element: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    maxnreg: int | None = None

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__name__} {self.label}"

    def source(self) -> ASTSource:
        """What Triton compiles: argument types by name, alignment as at a launch."""
        signature, attributes = {}, {}
        for i, argument in enumerate(self.kernel.arg_names):
            if argument in self.constants:
                signature[argument] = "constexpr"
                continue
            if argument in {"qk_scale", "eps"}:
                signature[argument] = "fp32"
                continue
            signature[argument] = _POINTERS.get(argument, f"*{self.element}") if argument.startswith("p_") else "i32"
            if argument not in _ANY_VALUE:
                attributes[(i,)] = [["tt.divisibility", 16]]
        constants = {(self.kernel.arg_names.index(name),): value for name, value in self.constants.items()}
        kind = GluonASTSource if self.kernel.is_gluon() else ASTSource
        return kind(self.kernel, signature, constants, attributes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What a case costs on an architecture. Bytes are of one program; a stack is where spilled registers go."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    assembly: str = field(repr=False)


def target(architecture: str) -> GPUTarget:
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64)


def compile_case(case: Case, architecture: str) -> Compiled:
    """Compiles for an architecture that need not be here. Raises what Triton raises when it cannot."""
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages} | tuning.COMPILER_OPTIONS
    if case.maxnreg:
        options["maxnreg"] = case.maxnreg
    if "DEPENDENT" in case.kernel.arg_names:
        dependent = tuning.dependent(architecture)
        case = replace(case, constants=case.constants | {"DEPENDENT": dependent})
        options |= {"launch_pdl": True} if dependent else {}
    kernel = triton.compile(case.source(), target=target(architecture), options=options)
    if not architecture.startswith("sm_"):
        assembly = kernel.asm["amdgcn"]
        counts = {
            name: int(value) for name, value in re.findall(r"^\s*\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly, re.M)
        }
        return Compiled(
            registers=counts["vgpr_count"],
            stack_bytes=4 * counts["vgpr_spill_count"],
            shared_bytes=kernel.metadata.shared,
            assembly=assembly,
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [DISASSEMBLER, "--dump-resource-usage", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        registers=found["REG"],
        stack_bytes=found["STACK"] + found["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        assembly=kernel.asm["ptx"],
    )


def _attention(architecture: str, element: str, head_dim: int, block_size: int, window: int, group: int) -> Iterator[Case]:
    padded = triton.next_power_of_2(head_dim)
    shapes = tuning.attention(architecture, padded, 4 if element == "fp32" else 2)
    common = {"NUM_KV_HEADS": 8, "GROUP": group, "D": head_dim, "D_PAD": padded, "WINDOW": window, "BLOCK_SIZE": block_size}
    common["DOT"] = _DOT[element]
    label = f"{element} d{head_dim} block {block_size} group {group}" + (f" window {window}" if window else "")
    for kernel, shape, extra in (
        (decode_kernel, shapes.decode, {"SPLIT": tuning.SPLIT_TOKENS}),
        (prefill_kernel, shapes.prefill, {}),
    ):
        yield Case(
            kernel=kernel,
            label=label,
            element=element,
            constants=common | {"BLOCK_M": shape.block_m, "TILE": shape.tile} | extra,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )


def _hopper() -> Iterator[Case]:
    shape = {"TILE": tuning.HOPPER_PREFILL_TILE, "STAGES": tuning.HOPPER_PREFILL_STAGES}
    for element, head_dim, block_size, group in (("bf16", 128, 16, 4), ("fp16", 128, 64, 8), ("bf16", 64, 16, 3)):
        yield Case(
            kernel=prefill_hopper_kernel,
            label=f"{element} d{head_dim} block {block_size} group {group}",
            element=element,
            constants=shape | {"NUM_KV_HEADS": 8, "GROUP": group, "D": head_dim, "BLOCK_SIZE": block_size},
            num_warps=LAUNCH["num_warps"],
            maxnreg=LAUNCH["maxnreg"],
        )


def cases(architecture: str) -> Iterator[Case]:
    """Every row of the tuning tables for an architecture, with the variants that change a kernel's code."""
    if architecture == "sm_90":
        yield from _hopper()
    yield from _attention(architecture, "bf16", 64, 16, 0, 3)
    yield from _attention(architecture, "fp16", 80, 32, 0, 1)
    yield from _attention(architecture, "bf16", 128, 16, 0, 4)
    yield from _attention(architecture, "bf16", 128, 64, 0, 4)
    yield from _attention(architecture, "bf16", 128, 16, 4096, 4)
    yield from _attention(architecture, "bf16", 256, 16, 0, 8)
    for head_dim in (64, 128, 256):
        yield from _attention(architecture, "fp32", head_dim, 16, 0, 4)
    yield Case(
        kernel=merge_kernel,
        label="bf16 d128",
        element="bf16",
        constants={"NUM_Q_HEADS": 32, "D": 128, "D_PAD": 128, "SPLITS": tuning.MERGE_SPLITS},
        num_warps=tuning.MERGE_WARPS,
    )
    yield Case(
        kernel=rotary_kv_write_kernel,
        label="bf16 d128",
        element="bf16",
        constants={
            "NUM_Q_HEADS": 32,
            "NUM_KV_HEADS": 8,
            "BLOCK_SIZE": 16,
            "HALF": 64,
            "HALF_PAD": 64,
            "HEADS": tuning.ROTARY_HEADS,
        },
        num_warps=tuning.ROTARY_WARPS,
    )
    for width in (128, 4096, tuning.MAX_NORM_WIDTH):
        rows, warps = tuning.norm_shape(width)
        yield Case(
            kernel=rms_norm_kernel,
            label=f"bf16 residual width {width}",
            element="bf16",
            constants={"ADD": True, "ROWS": rows, "WIDTH": width},
            num_warps=warps,
        )
    yield Case(
        kernel=silu_mul_kernel,
        label="bf16",
        element="bf16",
        constants={"BLOCK": tuning.SILU_MUL_BLOCK},
        num_warps=tuning.SILU_MUL_WARPS,
    )
    chunk, chunks = {"CHUNK": tuning.SAMPLE_CHUNK}, {"CHUNKS": 32}
    for kernel, constants, warps in (
        (chunk_best_kernel, chunk, tuning.SAMPLE_WARPS),
        (row_best_kernel, chunks, 1),
        (limit_kernel, {"TILE": tuning.LIMIT_TILE}, tuning.LIMIT_WARPS),
        (mass_kernel, chunk, tuning.SAMPLE_WARPS),
        (draw_kernel, chunk | chunks, tuning.SAMPLE_WARPS),
    ):
        yield Case(kernel=kernel, label="", element="fp32", constants=constants, num_warps=warps)
