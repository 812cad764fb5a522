"""On a Hopper GPU: every variant of the prefill attention, first its correctness, then its time.

`python -m tests.bench.prefill_variants [variant ...]`, from the repository root; needs torch and triton only. Each case of each
variant is checked in a process of its own with a time limit, so that one that hangs or faults hides no other; then one process
times the variants that did not hang. All of it takes less than 90 s. One line a result: `check ...` with the error and what is
allowed, `time ...` with microseconds and the share of the matmul measured beside it.
"""

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kernels import reference
from kernels.triton import tuning
from kernels.triton.paged_attention import paged_attention
from kernels.triton.tuning import HopperPrefill
from tests.bench.gpu_check import PREFILLS, compare, on_device, prefill_flops, seconds, time_attention
from tests.kernels.paged_case import paged_case

VARIANTS: dict[str, HopperPrefill | None] = {
    "triton": None,
    "split-128x2": HopperPrefill(tile=128, stages=2, split=True),
    "split-128x2-p": HopperPrefill(tile=128, stages=2, split=True, persistent=True),
    "split-128x2-pt": HopperPrefill(tile=128, stages=2, split=True, persistent=True, turns=True),
    "gluon-64x3": HopperPrefill(tile=64, stages=3, split=False),
    "split-64x4-qp": HopperPrefill(tile=64, stages=4, split=True, q_in_registers=True, persistent=True),
    "split-128x3-p": HopperPrefill(tile=128, stages=3, split=True, persistent=True),
}
CHECK_SECONDS, ALL_SECONDS = 55, 88
CHUNKS = [(70, 1), (5, 5), (700, 700), (1301, 200), (64, 64), (130, 2), (2000, 129), (257, 3), (128, 128)]
# The first two are what is timed, so that its compilations are there. Variants that differ from another in a number take fewer.
CASES = (
    (torch.bfloat16, (32, 8), 128, 16), (torch.bfloat16, (32, 8), 128, 64), (torch.float16, (9, 3), 64, 16),
    (torch.float16, (16, 2), 128, 16), (torch.bfloat16, (4, 4), 64, 64), (torch.float16, (12, 4), 128, 256),
)  # fmt: skip
FEWER = {"split-128x2": 1, "split-64x4-qp": 3, "split-128x3-p": 3}


def choose(variant: str) -> None:
    """Makes `attend` take a variant for the head sizes of 64 and 128."""
    shape = VARIANTS[variant]
    tuning.HOPPER_PREFILL.clear()
    if shape is not None:
        tuning.HOPPER_PREFILL.update({64: shape, 128: shape})


def poisoned(call: Callable[[], Tensor]) -> Tensor:
    """The result of a call to which all new memory holds NaN."""
    empty = torch.empty

    def bad(*arguments: Any, **settings: Any) -> Tensor:
        made = empty(*arguments, **settings)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    with mock.patch.object(torch, "empty", bad):
        return call()


def check(variant: str, i_case: int, device: torch.device) -> None:
    """One case against plain torch in float32, and three runs against each other."""
    choose(variant)
    dtype, heads, head_dim, block_size = CASES[i_case]
    name = f"{variant} d{head_dim} heads {heads[0]}/{heads[1]} block {block_size}"
    try:
        case = paged_case(CHUNKS, heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
        inputs: dict[str, Any] = {
            key: on_device(x, device) if isinstance(x, Tensor) else x for key, x in case.arguments().items()
        }
        exact = reference.paged_attention(**inputs | {key: inputs[key].float() for key in ("q", "k_cache", "v_cache")})
        plain = reference.paged_attention(**inputs)
        runs = [poisoned(lambda: paged_attention(**inputs)) for _ in range(3)]
        found = compare(name, runs[0], plain, exact)
        same = all(torch.equal(runs[0], other) for other in runs[1:])
    except Exception:  # noqa: BLE001 - told to whoever reads the list
        print(f"check {name}: FAILED {traceback.format_exc()[-700:]}", flush=True)
        return
    verdict = "ok" if found["ok"] and same else "WRONG"
    error = f"error {found['error']:.2e} of {found['allowed']:.2e}"
    print(f"check {name} {found['dtype']}: {verdict}, {error}{'' if same else ', runs differ'}", flush=True)
    if verdict == "WRONG":
        show_wrong(runs[0], exact, inputs["query_start_loc"].tolist())


def show_wrong(actual: Tensor, exact: Tensor, starts: list[int]) -> None:
    """Where the errors are: for each chunk the worst error and its first wrong tokens."""
    worst = ((actual.float() - exact).abs() / (1 + exact.abs())).nan_to_num(9e9).amax((1, 2))
    for (length, tokens), first in zip(CHUNKS, starts, strict=False):
        mine = worst[first : first + tokens]
        bad = (mine > 0.02).nonzero().flatten().tolist()
        print(
            f"  context {length} tokens {tokens}: worst {mine.max().item():.2e}, {len(bad)} wrong tokens {bad[:8]}", flush=True
        )


def measure(variants: list[str], device: torch.device) -> None:
    """Microseconds of a Llama-3-8B layer's prefills, bf16."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    matmul = 2 * 8192**3 / seconds(lambda: a @ b)
    print(f"matmul {matmul / 1e12:.0f} TFLOP/s", flush=True)
    for block_size in (16, 64):
        for variant in variants:
            choose(variant)
            found = []
            for name, chunks in PREFILLS.items() if block_size == 16 else [("8k", PREFILLS["8k"])]:
                try:
                    took = time_attention(chunks, device, block_size)
                    found.append(f"{name} {took * 1e6:.0f} us {prefill_flops(chunks) / took / matmul:.1%}")
                except Exception:  # noqa: BLE001 - told to whoever reads the list
                    found.append(f"{name} FAILED {traceback.format_exc()[-400:]}")
            print(f"time {variant} block {block_size}: {'; '.join(found)}", flush=True)


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("prefill_variants: no GPU here that torch can use; nothing was checked", file=sys.stderr)
        return 3
    device = torch.device("cuda", 0)
    if arguments[:1] == ["--check"]:
        check(arguments[1], int(arguments[2]), device)
        return 0
    if arguments[:1] == ["--time"]:
        measure(arguments[1:], device)
        return 0
    started = time.monotonic()
    print(torch.cuda.get_device_name(device), torch.__version__, flush=True)
    names, command = arguments or list(VARIANTS), [sys.executable, "-m", "tests.bench.prefill_variants"]
    # Side by side, because most of the time is the compiler's.
    processes = [
        (name, subprocess.Popen([*command, "--check", name, str(i)], env=os.environ | {"OMP_NUM_THREADS": "1"}))
        for i in range(len(CASES))
        for name in names
        if VARIANTS[name] is not None and i < FEWER.get(name, len(CASES))
    ]
    hung = {name for name, process in processes if not ended(f"check {name}", process, started + CHECK_SECONDS)}
    ended("time", subprocess.Popen([*command, "--time", *(name for name in names if name not in hung)]), started + ALL_SECONDS)
    return 0


def ended(name: str, process: subprocess.Popen, until: float) -> bool:
    """Whether a process ends by itself in time; one that does not is killed."""
    try:
        status = process.wait(max(until - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        print(f"{name}: out of time", flush=True)
        return False
    if status:
        print(f"{name}: exit status {status}", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
