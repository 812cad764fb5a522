"""On a machine with a GPU: every Triton kernel's correctness, then its figures against the copy and matmul measured there.

`python -m tests.bench.gpu_check [--correctness] [--dtype T] [--sweep]`, from the repository root, prints one JSON object; needs torch and
triton only. Exits 0 when all is right, 1 when a kernel is wrong, 3 where there is no GPU. `--correctness` measures nothing;
`--sweep` times other tiles for the head size of 128 than the one in kernels/triton/tuning.py. Figures are device time,
from CUDA graphs, medians; inputs are several times the L2 cache unless said.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

from kernels import ops, reference
from kernels.triton import sampling, tuning
from kernels.triton.paged_attention import attend, paged_attention
from kernels.triton.paged_plan import PagedPlan
from kernels.triton.rms_norm import add_rms_norm, rms_norm
from kernels.triton.rotary_kv_write import rotary_kv_write
from kernels.triton.silu_mul import silu_mul
from tests.kernels.paged_case import paged_case
from tests.kernels.sampling_cases import KINDS, VOCABULARIES, Case, make_case
from tests.kernels.tolerance import LITTLE

Check = dict[str, Any]
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def compare(name: str, actual: Tensor, plain: Tensor, exact: Tensor) -> Check:
    """The house's rule: at most twice plain torch's error against float32, and a little."""
    size = 1 + exact.abs()
    error = ((actual.float() - exact).abs() / size).max().item()
    allowed = 2 * ((plain.float() - exact).abs() / size).max().item() + LITTLE[actual.dtype]
    # A NaN compares as false, so it fails.
    return {
        "check": name,
        "dtype": str(actual.dtype).removeprefix("torch."),
        "error": error,
        "allowed": allowed,
        "ok": error <= allowed,
    }


def small_checks(dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    """Norm, SiLU·mul, rotation and write."""
    x, residual = (torch.randn(100, 1100).to(device, dtype) for _ in range(2))
    weight = torch.randn(1100).to(device, dtype)
    exact = reference.rms_norm(x.float(), weight.float(), 1e-5)
    yield compare("rms_norm", rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), exact)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    plain, plain_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    yield compare("add_rms_norm", normed, plain, reference.rms_norm(plain_total.float(), weight.float(), 1e-5))
    yield compare("add_rms_norm, sum", total, plain_total, plain_total.float())
    yield compare("silu_mul", silu_mul(x), reference.silu_mul(x), reference.silu_mul(x.float()))
    rows, head = torch.randn(9, 256).to(device, dtype), torch.randn(1000, 256).to(device, dtype)
    wide = ops.for_device("cuda").float_product(rows, head)
    exact = rows.double() @ head.double().t()
    yield compare("float_product", wide, reference.float_product(rows, head), exact.float())
    q, k, v = torch.randn(63, 15, 80).to(device, dtype).split([9, 3, 3], dim=1)
    angles = torch.arange(300).float()[:, None] * 10000.0 ** (-torch.arange(0, 80, 2).float() / 80)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
    positions, slots = torch.randint(0, 300, (63,)).to(device), torch.randperm(96)[:63].to(device)
    slots[5] = -1
    found, kept = (torch.zeros(2, 6, 16, 3, 80, dtype=dtype, device=device) for _ in range(2))
    wide = torch.zeros(2, 6, 16, 3, 80, device=device)
    actual = rotary_kv_write(q, k, v, table, positions, *found, slots)
    plain = reference.rotary_kv_write(q, k, v, table, positions, *kept, slots)
    exact = reference.rotary_kv_write(q.float(), k.float(), v.float(), table, positions, *wide, slots)
    yield compare("rotary_kv_write, q", actual, plain, exact)
    yield compare("rotary_kv_write, cache", found, kept, wide)


def sampling_checks(device: torch.device) -> Iterator[Check]:
    """Tokens of hard rows, and of as many as a step has, against plain torch's on the CPU."""
    for vocab in VOCABULARIES:
        for kind in KINDS:
            case = make_case(vocab, kind, vocab, 12)
            yield from sampled(f"{kind}, {vocab}", case, device)
    yield from sampled("normal, 128256", make_case(7, "normal", 128_256, 64), device)


def sampled(name: str, case: Case, device: torch.device) -> Iterator[Check]:
    logits, operators = case.logits.to(device), ops.for_device("cuda")
    actual = operators.sample(logits, case.filters, case.draws).tolist()
    expected = reference.sample(case.logits, case.filters, case.draws).tolist()
    best = operators.greedy(logits).tolist() == reference.greedy(case.logits).tolist()
    wrong = [(i, one, other) for i, (one, other) in enumerate(zip(actual, expected, strict=True)) if one != other]
    yield {"check": f"sample and greedy, {name}", "dtype": "float32", "wrong": wrong, "ok": best and not wrong}


def attention_checks(dtype: torch.dtype, device: torch.device, long: int) -> Iterator[Check]:
    """Mixed batches over head sizes, block sizes and windows, and independence from batch mates."""
    chunks = [(1, 1), (63, 1), (long, 1), (100, 37), (long // 2, 100), (130, 2), (128, 128), (long, long // 3)]
    for heads, head_dim, block_size, window in (
        ((9, 3), 64, 16, 0), ((32, 8), 128, 16, 0), ((32, 8), 128, 64, 0), ((32, 8), 128, 16, 300), ((8, 8), 80, 32, 0),
        ((8, 1), 96, 16, 64), ((16, 2), 256, 16, 0), ((4, 4), 64, 64, 0), ((16, 2), 128, 256, 0),
    ):  # fmt: skip
        case = paged_case(chunks, heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
        names = ("q", "k_cache", "v_cache", "block_tables", "seq_lens", "query_start_loc")
        inputs = {name: on_device(getattr(case, name), device) for name in names} | {
            "scale": case.scale,
            "sliding_window": window,
        }
        actual = poisoned(partial(paged_attention, **inputs))
        exact = reference.paged_attention(**inputs | {name: inputs[name].float() for name in names[:3]})
        yield compare(f"attention d{head_dim} b{block_size} w{window}", actual, reference.paged_attention(**inputs), exact)
        alone = {name: inputs[name][2:3] for name in ("q", "block_tables", "seq_lens")}
        one = paged_attention(**inputs | alone | {"query_start_loc": torch.tensor([0, 1], dtype=torch.int32, device=device)})
        same = torch.equal(one[0], actual[2])
        name = f"attention d{head_dim} b{block_size} w{window}, alone and in a batch"
        yield {"check": name, "dtype": str(dtype).removeprefix("torch."), "ok": same}


def poisoned(call: Callable[[], Tensor]) -> Tensor:
    """The result of a call to which all new memory holds NaN."""
    empty = torch.empty

    def bad(*arguments: Any, **settings: Any) -> Tensor:
        made = empty(*arguments, **settings)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    with mock.patch.object(torch, "empty", bad):
        return call()


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy with the same strides: the cache's layout is part of what is checked."""
    if x.is_contiguous():
        return x.to(device)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def correctness(device: torch.device, long: int = 3000, dtypes: tuple[torch.dtype, ...] = tuple(LITTLE)) -> list[Check]:
    """Every check in every type. `long`: the longest context."""
    torch.manual_seed(0)
    checks = [check for dtype in dtypes for check in (*small_checks(dtype, device), *attention_checks(dtype, device, long))]
    if torch.float32 in dtypes and device.type == "cuda":
        checks += sampling_checks(device)
    return checks


def seconds(call: Callable[[], Any]) -> float:
    """Device time of a call, median, without the host's part."""
    return do_bench_cudagraph(call, rep=50, return_mode="median") / 1e3


def wall_seconds(call: Callable[[], Any]) -> float:
    """Device time with the host's part, of a call that sends something from the host: median of events around it."""
    return do_bench(call, warmup=10, rep=50, return_mode="median") / 1e3


def limits(device: torch.device) -> dict[str, float]:
    """What this machine gives: a copy of 2 GiB (bytes read and written a second), a sum of them, a bf16 matmul of random numbers.

    The copy is the better of the library's own, timed by events (in a graph it becomes a copy node, which is a third slower), and of
    an elementwise kernel's.
    """
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    copied = min(wall_seconds(lambda: target.copy_(source)), seconds(lambda: torch.neg(source, out=target)))
    read = 2 * source.numel() / seconds(source.sum)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    return {
        "copy_bytes_per_s": 4 * source.numel() / copied,
        "read_bytes_per_s": read,
        "matmul_flops": 2 * 8192**3 / seconds(lambda: a @ b),
    }


def batch(chunks: list[tuple[int, int]], block_size: int, device: torch.device, shuffled: bool = True) -> dict[str, Any]:
    """Random inputs of a Llama-3-8B layer: chunks of (context with the chunk, chunk length), decodes first."""
    needed = [triton.cdiv(length, block_size) for length, _ in chunks]
    order = torch.randperm(sum(needed), dtype=torch.int32) if shuffled else torch.arange(sum(needed), dtype=torch.int32)
    tables = torch.zeros((len(chunks), max(needed)), dtype=torch.int32)
    for i, blocks in enumerate(order.split(needed)):
        tables[i, : len(blocks)] = blocks
    storage = torch.randn((sum(needed), KV_HEADS, 2, block_size, HEAD_DIM), dtype=torch.bfloat16, device=device)
    both = storage.permute(2, 0, 3, 1, 4)
    num_tokens = sum(n for _, n in chunks)
    starts = torch.tensor([0, *(n for _, n in chunks)]).cumsum(0).to(torch.int32)
    plan = PagedPlan(
        seq_lens=torch.tensor([length for length, _ in chunks], dtype=torch.int32, device=device),
        query_start_loc=starts.to(device),
        block_tables=tables.to(device),
        num_decodes=sum(n == 1 for _, n in chunks),
        num_tokens=num_tokens,
        max_seq_len=max(length for length, _ in chunks),
    )
    q = torch.randn((num_tokens, HEADS, HEAD_DIM), dtype=torch.bfloat16, device=device)
    return {"q": q, "k_cache": both[0], "v_cache": both[1], "plan": plan, "scale": HEAD_DIM**-0.5}


def time_attention(chunks: list[tuple[int, int]], device: torch.device, block_size: int = 16, shuffled: bool = True) -> float:
    inputs = batch(chunks, block_size, device, shuffled)
    return seconds(lambda: attend(**inputs))


def decode_bytes(chunks: list[tuple[int, int]]) -> int:
    """Keys and values read once, queries read and outputs written."""
    return sum(length for length, _ in chunks) * KV_HEADS * HEAD_DIM * 4 + len(chunks) * HEADS * HEAD_DIM * 4


def prefill_flops(chunks: list[tuple[int, int]]) -> int:
    """Two products of every query with every position that it sees."""
    seen = sum(n * length - n * (n - 1) // 2 for length, n in chunks)
    return 4 * HEADS * HEAD_DIM * seen


def figures(device: torch.device) -> dict[str, Any]:
    """engine.md's table, as far as kernels alone decide it. Llama-3-8B's layer, bf16."""
    limit = limits(device)
    copy, matmul = limit["copy_bytes_per_s"], limit["matmul_flops"]
    found: dict[str, Any] = {"limits": limit}
    for size, context in ((1, 32768), (8, 8192), (16, 2048), (17, 2048), (64, 2048), (64, 8192), (256, 1500), (256, 2048)):
        for block_size in (16, 64):
            chunks = [(context, 1)] * size
            time = time_attention(chunks, device, block_size)
            name = f"decode batch {size} context {context} block {block_size}"
            found[name] = {"us": time * 1e6, "of_copy": decode_bytes(chunks) / time / copy}
    for chunks, name in (
        ([(8192, 8192)], "8k"),
        ([(2048, 2048)] * 4, "4 x 2k"),
        ([(32768, 2048)], "2k after 30k"),
        ([(512, 512)] * 16, "16 x 512"),
    ):
        time = time_attention(chunks, device)
        with mock.patch.object(tuning, "HOPPER_PREFILL_HEAD_DIMS", ()):
            triton_us = time_attention(chunks, device) * 1e6
        found[f"prefill {name}"] = {
            "us": time * 1e6,
            "of_matmul": prefill_flops(chunks) / time / matmul,
            "triton_us": triton_us,
        }
    decodes, chunk = [(2048, 1)] * 64, [(2048, 2048)]
    both, one, other = (time_attention(c, device) for c in (decodes + chunk, decodes, chunk))
    found["mixed 64 decodes + 2k chunk"] = {"us": both * 1e6, "over_the_sum_of_parts": both / (one + other)}
    contiguous = time_attention(decodes, device, 2048, shuffled=False)
    found["paged over contiguous"] = {
        "block 16": one / contiguous,
        "block 64": time_attention(decodes, device, 64) / contiguous,
    }
    x, residual = (torch.randn(65536, 4096, dtype=torch.bfloat16, device=device) for _ in range(2))
    weight = torch.randn(4096, dtype=torch.bfloat16, device=device)
    found["add_rms_norm 65536 x 4096"] = {
        "of_copy": 8 * x.numel() / seconds(lambda: add_rms_norm(x, residual, weight, 1e-5)) / copy
    }
    for rows, filters in itertools.product((1, 64, 256), FILTERS):
        case = make_case(3, "normal", 128_256, rows)
        logits = case.logits.to(device)
        case.filters[:] = torch.tensor(FILTERS[filters], dtype=torch.float64)
        take = partial(sampling.sample, logits, case.filters, case.draws)
        found[f"sample, {filters}, {rows} x 128256"] = {"us": wall_seconds(take) * 1e6}
    wide = torch.randn(16384, 28672, dtype=torch.bfloat16, device=device)
    found["silu_mul 16384 x 14336"] = {"of_copy": 3 * wide.numel() / seconds(lambda: silu_mul(wide)) / copy}
    return found


FILTERS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.8, 0, 1.0, 0.0),
    "top-k": (0.8, 50, 1.0, 0.0),
    "top-p": (0.8, 0, 0.95, 0.0),
    "all": (0.8, 50, 0.95, 0.05),
}
DECODES = {
    "1x1024": [(1024, 1)],
    "1x32768": [(32768, 1)],
    "8x2048": [(2048, 1)] * 8,
    "64x2048": [(2048, 1)] * 64,
    "256x1024": [(1024, 1)] * 256,
}
PREFILLS = {"8k": [(8192, 8192)], "4x2k": [(2048, 2048)] * 4, "2k after 30k": [(32768, 2048)], "16x512": [(512, 512)] * 16}


def timed(batches: dict[str, list[tuple[int, int]]], device: torch.device, block_size: int = 16) -> dict[str, Any]:
    """Microseconds of each batch; what does not fit says so."""
    found: dict[str, Any] = {}
    for name, chunks in batches.items():
        try:
            found[name] = round(time_attention(chunks, device, block_size) * 1e6, 1)
        except triton.runtime.errors.OutOfResources as error:
            found[name] = str(error)
    return found


@mock.patch.object(tuning, "HOPPER_PREFILL_HEAD_DIMS", ())
def sweep(device: torch.device) -> dict[str, Any]:
    """Microseconds of other shapes of the Triton kernels, head size 128, in the order tried."""
    table, row = tuning.ATTENTION_16_BIT[tuning.architecture(device)], 256
    kept, found = table[row], {}
    decodes = ((64, 4, 3), (64, 4, 5), (128, 4, 2), (128, 4, 3), (128, 4, 5), (256, 4, 2), (256, 8, 2), (256, 8, 3))
    for tile, warps, stages in decodes:
        shape = tuning.Tile(block_m=16, tile=tile, num_warps=warps, num_stages=stages)
        table[row] = tuning.AttentionTuning(decode=shape, prefill=kept.prefill)
        found[f"decode {tile} {warps} {stages}"] = timed(DECODES, device)
        found[f"decode {tile} {warps} {stages}, block 64"] = timed({"64x2048": DECODES["64x2048"]}, device, 64)
    prefills = ((128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 8, 5), (128, 64, 8, 7), (128, 128, 8, 3), (128, 128, 8, 5))
    for m, tile, warps, stages in (
        *prefills,
        (64, 64, 4, 3),
        (64, 64, 4, 5),
        (64, 128, 4, 3),
        (128, 64, 4, 5),
        (128, 32, 8, 5),
    ):
        shape = tuning.Tile(block_m=m, tile=tile, num_warps=warps, num_stages=stages)
        table[row] = tuning.AttentionTuning(decode=kept.decode, prefill=shape)
        found[f"prefill {m} {tile} {warps} {stages}"] = timed(PREFILLS, device)
    table[row] = kept
    merge = tuning.MERGE_SPLITS, tuning.MERGE_WARPS
    for tuning.MERGE_SPLITS, tuning.MERGE_WARPS in ((16, 1), (8, 2), (8, 1), (4, 1)):
        found[f"merge of {tuning.MERGE_SPLITS} by {tuning.MERGE_WARPS}"] = timed(DECODES, device)
    tuning.MERGE_SPLITS, tuning.MERGE_WARPS = merge
    programs = tuning.PROGRAMS_PER_MULTIPROCESSOR
    for tuning.PROGRAMS_PER_MULTIPROCESSOR in (2, 3, 4, 6, 8, 12):
        tuning.persistent_programs.cache_clear()
        found[f"{tuning.PROGRAMS_PER_MULTIPROCESSOR} programs a multiprocessor"] = timed(DECODES, device)
    tuning.PROGRAMS_PER_MULTIPROCESSOR = programs
    tuning.persistent_programs.cache_clear()
    case = make_case(3, "normal", 128_256, 64)
    logits, case.filters[:] = case.logits.to(device), torch.tensor(FILTERS["all"], dtype=torch.float64)
    limit = tuning.LIMIT_TILE, tuning.LIMIT_WARPS
    for tuning.LIMIT_TILE, tuning.LIMIT_WARPS in ((16384, 32), (16384, 16), (8192, 8), (4096, 16), (4096, 8)):
        took = wall_seconds(partial(sampling.sample, logits, case.filters, case.draws))
        found[f"limits by tiles of {tuning.LIMIT_TILE}, {tuning.LIMIT_WARPS} warps"] = round(took * 1e6, 1)
    tuning.LIMIT_TILE, tuning.LIMIT_WARPS = limit
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description="Correctness and figures of the Triton kernels on a GPU.")
    parser.add_argument("--correctness", action="store_true", help="measure nothing")
    parser.add_argument("--dtype", default="", help="check one type alone, and measure nothing")
    parser.add_argument("--sweep", action="store_true", help="time other tiles, too")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_check: no GPU here that torch can use; nothing was checked", file=sys.stderr)
        return 3
    device = torch.device("cuda", 0)
    dtypes = (getattr(torch, options.dtype),) if options.dtype else tuple(LITTLE)
    checks = correctness(device, dtypes=dtypes)
    wrong = [check for check in checks if not check["ok"]]
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "tuning": tuning.architecture(device),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]},
        "correct": not wrong,
        "checks": checks,
    }
    if not (options.correctness or options.dtype or wrong):
        report["figures"] = figures(device)
    if options.sweep and not wrong:
        report["sweep"] = sweep(device)
    print(json.dumps(report, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
