"""On a machine with a GPU: the whole engine's figures of a Llama-3-8B shape against the limits measured there, and against transformers.

    python -m tests.bench.gpu_engine [--batches 1x1024,8x2048,64x2048,256x1024] [--only decode,linears,…] [--peer]

prints one JSON object; exits 3 where there is no GPU. Weights are random (speed does not depend on them), prompts are random and
distinct, everything is bfloat16. Steps are wall-clock times of `Engine.step`, medians, host work included. `limit`: the bytes that a
step must read (every sequence's keys and values, and the weights, once) at the rate of a copy measured in the same run, and for
the weights their arithmetic at the rate of a large matmul where that takes longer; for a prefill its arithmetic. Parts: `linears`
(the library's products against the bytes of their weights), `decode` (and the same without CUDA graphs, overlap or dependent
launches, in turns), `kernels` (with `decode`: device time by kernel), `sampled`, `prefill`, `mixed` (64 decodes beside a
2,048-token chunk), `short` and `arrivals` (steps with short prompts, from CUDA graphs and launched by Python), `prefix` (a hit of
90 % of a 4,096-token prompt), `little` (`short` and `arrivals` with Llama-3.2-1B's shape). `--peer`: output tokens a second of
`generate` and of transformers' continuous batching.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from torch.nn import functional

from kernels.triton import tuning
from tests.bench.gpu_bench import LLAMA_3_8B, Bench, Figures, median_ms, times_of, without_graphs
from tests.bench.gpu_check import limits, seconds
from tests.bench.gpu_short import arrivals, little, short

PARTS = ("linears", "decode", "kernels", "prefill", "mixed", "short", "arrivals", "prefix", "little")
KV_TOKEN_BYTES = 32 * 8 * 128 * 2 * 2
LAYER_WEIGHTS = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
HEAD = (128256, 4096)
READ_BYTES = 2 * (32 * sum(n * k for n, k in LAYER_WEIGHTS.values()) + HEAD[0] * HEAD[1])
"""Of the weights, in a step: all but the embedding, of which a step reads a row a token."""

TOKEN_FLOPS = READ_BYTES - 2 * HEAD[0] * HEAD[1]
"""Of a prompt token's linears without the head, which only a prompt's last token needs: 2 a weight of 2 bytes."""


def multiply_all(x: torch.Tensor, weights: list[torch.Tensor]) -> None:
    for weight in weights:
        functional.linear(x, weight)


def linears(device: torch.device, copy: float) -> Figures:
    """Share of the copy rate at which a library's product reads its weights; weights of several layers in turn, so that none is in L2."""
    found: Figures = {}
    for name, (n, k) in (LAYER_WEIGHTS | {"head": HEAD}).items():
        weights = [torch.randn(n, k, dtype=torch.bfloat16, device=device) for _ in range(2 if name == "head" else 6)]
        for rows in (1, 8, 16, 64, 128, 256):
            x = torch.randn(rows, k, dtype=torch.bfloat16, device=device)
            took = seconds(partial(multiply_all, x, weights)) / len(weights)
            found[f"{name} {rows}"] = round(2 * n * k / took / copy, 3)
    return found


@contextmanager
def without_overlap(bench: Bench) -> Iterator[None]:
    runner = bench.engine._loop._executor
    runner.overlaps = False  # type: ignore[misc]
    try:
        yield
    finally:
        runner.overlaps = True  # type: ignore[misc]


@contextmanager
def without_dependent_launch(bench: Bench) -> Iterator[None]:
    """Every kernel starts when the one in front has ended."""
    try:
        launch_dependents(bench, on=False)
        yield
    finally:
        launch_dependents(bench, on=True)


def launch_dependents(bench: Bench, on: bool) -> None:
    tuning.DEPENDENT_LAUNCH = on
    tuning.layer_options.cache_clear()
    torch.cuda.synchronize()
    bench.engine._loop._executor._captured.clear()  # type: ignore[attr-defined]


def decode(bench: Bench, batch: int, context: int, copy: float, matmul: float, kernels: bool = False, **how: Any) -> Figures:
    """One batch's decode step as it is, without CUDA graphs, and without overlap, in turns; then what the device did in it."""
    decoded = bench.decoded
    names = bench.fill(batch, context, 500, **how)
    first_s = sum(times_of(bench, 3, settle=0))
    ways: dict[str, list[float]] = {
        name: [] for name in ("step_ms", "without_graphs_ms", "without_overlap_ms", "without_dependent_launch_ms")
    }
    contexts = []
    for _ in range(4):
        ways["step_ms"] += times_of(bench, 12, settle=4)
        contexts.append(batch * context + bench.decoded - decoded - 6 * batch)
        with without_graphs():
            ways["without_graphs_ms"] += times_of(bench, 4)
        with without_overlap(bench):
            ways["without_overlap_ms"] += times_of(bench, 4)
        with without_dependent_launch(bench):
            ways["without_dependent_launch_ms"] += times_of(bench, 6)
    # An operation a byte of weights and row.
    kv_bytes = statistics.mean(contexts) * KV_TOKEN_BYTES
    limit = max(READ_BYTES / copy, batch * READ_BYTES / matmul) + kv_bytes / copy
    median = statistics.median(ways["step_ms"])
    profile = kernel_times(bench, median) if kernels else {}
    bench.empty(names)
    return {
        **{name: median_ms(values) for name, values in ways.items()},
        "p90_ms": 1e3 * statistics.quantiles(ways["step_ms"], n=10)[8],
        "first_three_steps_s": first_s,
        "mean_context": statistics.mean(contexts) / batch,
        "limit_ms": limit * 1e3,
        "of_limit": limit / median,
        "tokens_per_s": batch / median,
        **profile,
    }


def kernel_times(bench: Bench, step_s: float) -> Figures:
    """Microseconds on the device by kernel, from torch's profiler, and the share of a step of `step_s` that the device computes."""
    with without_overlap(bench):
        times_of(bench, 2)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            times_of(bench, 8, settle=0)
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    busy = sum(row.self_device_time_total for row in rows) / 8
    return {
        "device_ms": busy / 1e3,
        "busy": busy / 1e6 / step_s,
        "kernels": {row.key[:70]: [round(row.self_device_time_total / 8, 1), row.count // 8] for row in rows[:16]},
    }


def prefill(bench: Bench, length: int, matmul: float) -> Figures:
    """A prompt alone: its steps' time, and the share of the matmul rate that its arithmetic takes (attention's included)."""
    times = []
    for _ in range(4):
        bench.add(bench.prompt(length), 1)
        took = 0.0
        while bench.engine.has_work:
            took += bench.step()[0]
        times.append(took)
    attention = 32 * 4 * 32 * 128 * length * (length + 1) / 2
    took = statistics.median(times[1:])
    return {"ms": took * 1e3, "of_matmul": (length * TOKEN_FLOPS + attention) / took / matmul, "tokens_per_s": length / took}


def mixed(bench: Bench, matmul: float) -> Figures:
    """64 decodes of context 2,048 with and without a 2,048-token prompt beside them, against what its arithmetic explains."""
    names = bench.fill(64, 2048, 400)
    for _ in range(3):
        bench.step()
    alone, beside = [], []
    for _ in range(8):
        alone += [bench.step()[0] for _ in range(4)]
        names.append(bench.add(bench.prompt(2048), 1))
        # Launched ahead of what is heard, the prompt is in one of the next steps.
        beside.append(max(bench.step()[0] for _ in range(3)))
    bench.empty(names)
    flops = 2048 * TOKEN_FLOPS + 32 * 4 * 32 * 128 * 2048 * 2049 / 2
    explained = statistics.median(alone) + flops / matmul
    worst = max(beside[1:])
    return {
        "alone_ms": median_ms(alone),
        "beside_ms": median_ms(beside[1:]),
        "worst_ms": worst * 1e3,
        "explained_ms": explained * 1e3,
        "median_over_explained": statistics.median(beside[1:]) / explained,
        "worst_over_explained": worst / explained,
    }


def prefix(model_dir: str) -> Figures:
    """Time to the first token of a 4,096-token prompt, new and with 90 % of it in the cache."""
    bench = Bench(model_dir, 8 << 30, enable_prefix_cache=True)
    engine = bench.engine
    new, hit = [], []
    for _ in range(6):
        shared = bench.prompt(3686)
        for times in (new, hit):
            bench.add(shared + bench.prompt(410), 1)
            took = 0.0
            while engine.has_work:
                took += bench.step()[0]
            times.append(took)
    engine.close()
    new_ms, hit_ms = median_ms(new[1:]), median_ms(hit[2:])
    every = {"new": [round(1e3 * took, 2) for took in new], "hit": [round(1e3 * took, 2) for took in hit]}
    return {"new_ms": new_ms, "hit_ms": hit_ms, "less": 1 - hit_ms / new_ms, "every_ms": every}


def our_rate(bench: Bench, prompts: list[tuple[int, ...]], new: int) -> float:
    began = time.perf_counter()
    for one in prompts:
        bench.add(one, new)
    while bench.engine.has_work:
        bench.step()
    return len(prompts) * new / (time.perf_counter() - began)


def peers(model_dir: str, bench: Bench, batches: tuple[int, ...] = (8, 32), prompt: int = 512, new: int = 64) -> Figures:
    """Output tokens a second of whole runs, prefill included, in turns: ours, `generate`, and its continuous batching."""
    config = transformers.AutoConfig.from_pretrained(model_dir)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    found: Figures = {}
    for batch in batches:
        rates: dict[str, list[float]] = {"sluice": [], "generate": []}
        for _ in range(3):
            prompts = [bench.prompt(prompt) for _ in range(batch)]
            rates["sluice"].append(our_rate(bench, prompts, new))
            ids = torch.tensor(prompts, device="cuda")
            began = time.perf_counter()
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=False,
                    pad_token_id=0,
                )
            torch.cuda.synchronize()
            rates["generate"].append(batch * new / (time.perf_counter() - began))
            if out.shape[1] != prompt + new:
                raise RuntimeError("generate said another number of tokens")
        medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
        found[f"batch {batch}"] = {"tokens_per_s": rates, "ratio": medians["sluice"] / medians["generate"]}
    return found | continuous(model, bench, max(batches), prompt, new)


def continuous(model: Any, bench: Bench, batch: int, prompt: int, new: int) -> Figures:
    """transformers' own continuous batching over a paged cache."""
    generation = transformers.GenerationConfig(
        max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=-1, use_cache=True
    )
    rates: dict[str, list[float]] = {"sluice": [], "continuous": []}
    for _ in range(3):
        prompts = [bench.prompt(prompt) for _ in range(batch)]
        rates["sluice"].append(our_rate(bench, prompts, new))
        began = time.perf_counter()
        out = model.generate_batch(inputs=[list(one) for one in prompts], generation_config=generation, progress_bar=False)
        took = time.perf_counter() - began
        rates["continuous"].append(sum(len(one.generated_tokens) for one in out.values()) / took)
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    return {f"continuous batching, {batch}": {"tokens_per_s": rates, "ratio": medians["sluice"] / medians["continuous"]}}


def measure(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Any]]:
    only = options.only.split(",") if options.only else PARTS
    limit = limits(device)
    copy, matmul = limit["copy_bytes_per_s"], limit["matmul_flops"]
    yield "limits", limit
    if "linears" in only:
        yield "linears", linears(device, copy)
    with tempfile.TemporaryDirectory() as model_dir:
        (Path(model_dir) / "config.json").write_text(json.dumps(LLAMA_3_8B), encoding="utf-8")
        bench = Bench(model_dir, options.kv_gib << 30)
        yield "load_s", bench.load_s
        for name in options.batches.split(","):
            batch, context = (int(part) for part in name.split("x"))
            if "decode" in only:
                yield f"decode {name}", decode(bench, batch, context, copy, matmul, kernels="kernels" in only)
        if "sampled" in only:
            yield "decode 64x1024, greedy", decode(bench, 64, 1024, copy, matmul)
            yield "decode 64x1024, temperature", decode(bench, 64, 1024, copy, matmul, temperature=0.8)
            yield "decode 64x1024, top-p", decode(bench, 64, 1024, copy, matmul, temperature=0.8, top_p=0.95)
            yield "decode 64x1024, top-k, top-p", decode(bench, 64, 1024, copy, matmul, temperature=0.8, top_k=50, top_p=0.95)
        if "prefill" in only:
            for length in (512, 2048, 8192):
                yield f"prefill {length}", prefill(bench, length, matmul)
        if "mixed" in only:
            yield "mixed", mixed(bench, matmul)
        if "short" in only:
            yield "short prompts", short(bench)
        if "arrivals" in only:
            for batch, context, prompt in ((8, 512, 128), (8, 512, 512), (32, 512, 256), (64, 1024, 256)):
                yield f"arrivals {batch} x {context}, prompts of {prompt}", arrivals(bench, batch, context, prompt)
        if options.peer:
            yield "peers", peers(model_dir, bench)
        bench.engine.close()
        del bench
        torch.cuda.empty_cache()
        if "prefix" in only:
            yield "prefix", prefix(model_dir)
    if "little" in only:
        yield "Llama-3.2-1B's shape", little(8 << 30)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1x1024,8x2048,64x2048,256x1024")
    parser.add_argument("--only", default="", help=f"some of {','.join(PARTS)},sampled")
    parser.add_argument("--kv-gib", type=int, default=40)
    parser.add_argument("--peer", action="store_true")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_engine: no GPU here that torch can use; nothing was measured", file=sys.stderr)
        return 3
    device = torch.device("cuda", 0)
    report: Figures = {
        "device": torch.cuda.get_device_name(device),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__},
        "parameters": vars(options),
    }
    for name, value in measure(options, device):
        report[name] = value
        print(name, json.dumps(value), file=sys.stderr, flush=True)
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
