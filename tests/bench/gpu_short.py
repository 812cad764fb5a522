"""Steps with short prompts, from CUDA graphs and launched by Python, in turns: what the first is worth."""

import json
import tempfile
from pathlib import Path

from tests.bench.gpu_bench import LLAMA_3_8B, Bench, Figures, median_ms, times_of, without_graphs

LLAMA_3_2_1B = LLAMA_3_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def short(bench: Bench) -> Figures:
    """Milliseconds to the token of a lone short prompt, from CUDA graphs and launched by Python, in turns."""
    found: Figures = {}
    for length in (64, 256, 512, 1000):
        ways: dict[str, list[float]] = {"graph": [], "python": []}
        for _ in range(8):
            ways["graph"].append(to_the_end(bench, length))
            with without_graphs():
                ways["python"].append(to_the_end(bench, length))
        found[str(length)] = {way: round(median_ms(times[3:]), 3) for way, times in ways.items()}
    return found


def to_the_end(bench: Bench, length: int) -> float:
    """Seconds of the steps of a prompt that says one token."""
    bench.add(bench.prompt(length), 1)
    took = 0.0
    while bench.engine.has_work:
        took += bench.step()[0]
    return took


def arrivals(bench: Bench, batch: int, context: int, prompt: int) -> Figures:
    """Milliseconds of a step of `batch` decodes, alone and with a new prompt in each, from CUDA graphs and launched by Python, in turns."""
    names = bench.fill(batch, context, 4000)
    ways: dict[str, list[float]] = {"alone": [], "graph": [], "python": []}
    for _ in range(6):
        ways["alone"] += times_of(bench, 8)
        ways["graph"] += with_arrivals(bench, prompt, 12)
        with without_graphs():
            ways["python"] += with_arrivals(bench, prompt, 12)
    bench.empty(names)
    return {way: round(median_ms(times[len(times) // 3 :]), 3) for way, times in ways.items()}


def with_arrivals(bench: Bench, prompt: int, steps: int) -> list[float]:
    times = []
    for _ in range(steps):
        bench.add(bench.prompt(prompt), 1)
        times.append(bench.step()[0])
    return times[3:]


def little(kv_cache_bytes: int) -> Figures:
    """`short` and `arrivals` of a model whose arithmetic takes less than Python's launches."""
    with tempfile.TemporaryDirectory() as model_dir:
        (Path(model_dir) / "config.json").write_text(json.dumps(LLAMA_3_2_1B), encoding="utf-8")
        bench = Bench(model_dir, kv_cache_bytes)
        found = {"short": short(bench)} | {f"{n} x 512, prompts of 128": arrivals(bench, n, 512, 128) for n in (8, 64)}
        bench.engine.close()
    return found
