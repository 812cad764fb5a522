"""On a Hopper GPU: every variant of the prefill attention, first its correctness, then its time.

`python -m tests.bench.prefill_variants [variant ...]`, from the repository root; needs torch and triton only. Each variant runs in
processes of its own with a time limit, so that one that hangs or faults hides no other; all of it takes less than 90 s.
One line a result: `check ...` with the error and what is allowed, `time ...` with microseconds and the share of the matmul.
"""

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
from tests.bench.gpu_check import PREFILLS, compare, limits, on_device, prefill_flops, time_attention
from tests.kernels.paged_case import paged_case

VARIANTS: dict[str, HopperPrefill | None] = {
    "triton": None,
    "split-128x2": HopperPrefill(tile=128, stages=2, split=True),
    "split-128x2-p": HopperPrefill(tile=128, stages=2, split=True, persistent=True),
    "gluon-64x3": HopperPrefill(tile=64, stages=3, split=False),
    "split-64x4-qp": HopperPrefill(tile=64, stages=4, split=True, q_in_registers=True, persistent=True),
    "split-128x3-p": HopperPrefill(tile=128, stages=3, split=True, persistent=True),
}
CHECK_SECONDS, TIME_SECONDS, ALL_SECONDS = 40, 20, 85
CHUNKS = [(70, 1), (5, 5), (700, 700), (1301, 200), (64, 64), (130, 2), (2000, 129), (257, 3), (128, 128)]
CASES = (
    (torch.bfloat16, (32, 8), 128, 16, 0), (torch.float16, (9, 3), 64, 16, 0), (torch.bfloat16, (16, 2), 128, 64, 0),
    (torch.bfloat16, (4, 4), 64, 64, 0), (torch.float16, (12, 4), 128, 16, 0), (torch.float16, (8, 8), 128, 256, 0),
    (torch.bfloat16, (32, 8), 128, 16, 300),
)  # fmt: skip


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


def check(variant: str) -> None:
    """Every case against plain torch in float32, and three runs against each other."""
    device = torch.device("cuda", 0)
    choose(variant)
    for dtype, heads, head_dim, block_size, window in CASES:
        name = f"d{head_dim} heads {heads[0]}/{heads[1]} block {block_size} window {window}"
        try:
            case = paged_case(CHUNKS, heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
            inputs = {key: on_device(x, device) if isinstance(x, Tensor) else x for key, x in case.arguments().items()}
            inputs["sliding_window"] = window
            exact = reference.paged_attention(**inputs | {key: inputs[key].float() for key in ("q", "k_cache", "v_cache")})
            plain = reference.paged_attention(**inputs)
            runs = [poisoned(lambda inputs=inputs: paged_attention(**inputs)) for _ in range(3)]
            found = compare(name, runs[0], plain, exact)
            same = all(torch.equal(runs[0], other) for other in runs[1:])
            verdict = "ok" if found["ok"] and same else "WRONG"
            error = f"error {found['error']:.2e} of {found['allowed']:.2e}"
            print(f"check {variant}: {name} {found['dtype']}: {verdict}, {error}{'' if same else ', runs differ'}", flush=True)
            if verdict == "WRONG":
                show_wrong(runs[0], exact, inputs["query_start_loc"].tolist())
        except Exception:  # noqa: BLE001 - a variant that fails hides no other
            print(f"check {variant}: {name}: FAILED {traceback.format_exc()[-700:]}", flush=True)


def show_wrong(actual: Tensor, exact: Tensor, starts: list[int]) -> None:
    """Where the errors are: for each chunk the worst error and the first wrong token of it."""
    worst = ((actual.float() - exact).abs() / (1 + exact.abs())).nan_to_num(9e9).amax((1, 2))
    for (length, _), first, last in zip(CHUNKS, starts, starts[1:], strict=False):
        bad = (worst[first:last] > 0.02).nonzero().flatten().tolist()
        print(f"  context {length} tokens {last - first}: worst {worst[first:last].max().item():.2e}, wrong tokens {bad[:8]}")


def measure(variant: str) -> None:
    """Microseconds of a Llama-3-8B layer's prefills."""
    device = torch.device("cuda", 0)
    choose(variant)
    matmul = limits(device)["matmul_flops"]
    for block_size in (16, 64):
        for name, chunks in PREFILLS.items():
            try:
                took = time_attention(chunks, device, block_size)
                share = prefill_flops(chunks) / took / matmul
                print(
                    f"time {variant}: {name} block {block_size}: {took * 1e6:.0f} us, {share:.1%} of {matmul / 1e12:.0f} TFLOP/s",
                    flush=True,
                )
            except Exception:  # noqa: BLE001 - a variant that fails hides no other
                print(f"time {variant}: {name} block {block_size}: FAILED {traceback.format_exc()[-500:]}", flush=True)


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("prefill_variants: no GPU here that torch can use; nothing was checked", file=sys.stderr)
        return 3
    if arguments[:1] == ["--check"]:
        check(arguments[1])
        return 0
    if arguments[:1] == ["--time"]:
        measure(arguments[1])
        return 0
    names, started = arguments or list(VARIANTS), time.monotonic()
    print(torch.cuda.get_device_name(0), torch.__version__, flush=True)
    command = [sys.executable, "-m", "tests.bench.prefill_variants"]
    # Checks side by side, because most of their time is the compiler's; then times, one after another.
    checks = {name: subprocess.Popen([*command, "--check", name]) for name in names}
    for name, process in checks.items():
        wait(f"check {name}", process, started + CHECK_SECONDS - time.monotonic())
    for name in names:
        left = min(TIME_SECONDS, started + ALL_SECONDS - time.monotonic())
        if left < 5:
            print(f"time {name}: no time left")
            continue
        wait(f"time {name}", subprocess.Popen([*command, "--time", name]), left)
    return 0


def wait(name: str, process: subprocess.Popen, limit: float) -> None:
    """Waits for a process for `limit` seconds, then ends it."""
    try:
        status = process.wait(max(limit, 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        status = "out of time"
    if status:
        print(f"{name}: {status}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
