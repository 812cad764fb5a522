"""A prompt's chunk beside decodes against the two apart: the step of both should cost no more than their sum.

    python -m tests.bench.mixed [--rows 8] [--chunk 128] [--context 32] [--rounds 12]

A round times a step of `rows` decodes, a step of the same with a whole prompt of `chunk` tokens in it, and a step of such a prompt
alone, one after another, so that what disturbs the machine disturbs all three.
"""

import argparse
import statistics
import time
from typing import Any

from engine import Engine, EngineConfig
from engine.openmp import prefer_short_spin
from service.cli.demo_model import ensure_demo_model
from tests.bench import report
from tests.bench.step import requests


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=report.at_least(1), default=8)
    parser.add_argument("--chunk", type=report.at_least(1), default=128)
    parser.add_argument("--context", type=report.at_least(1), default=32)
    parser.add_argument("--rounds", type=report.at_least(1), default=12)
    return parser.parse_args()


def timed_step(engine: Engine, num_decode: int, num_prefill: int) -> float:
    """Seconds of one step. Raises RuntimeError when it was of other tokens."""
    start = time.perf_counter()
    stats = engine.step().stats
    took = time.perf_counter() - start
    if (stats.num_decode_tokens, stats.num_prefill_tokens) != (num_decode, num_prefill):
        raise RuntimeError(f"a step of {stats.num_decode_tokens} decodes and {stats.num_prefill_tokens} tokens of prompts")
    return took


def measure(engine: Engine, arguments: argparse.Namespace) -> dict[str, Any]:
    alone, mixed, chunks = [], [], []
    rows, chunk = arguments.rows, arguments.chunk
    for i in range(arguments.rounds + 1):
        for request in requests(f"rows-{i}", rows, arguments.context, 16 + rows):
            engine.add(request)
        while engine.step().stats.num_decode_tokens < rows:
            pass
        engine.step()
        decode_s = [timed_step(engine, rows, 0) for _ in range(3)]
        engine.add(next(requests(f"beside-{i}", 1, chunk, 1)))
        mixed_s = timed_step(engine, rows, chunk)
        while engine.has_work:
            engine.step()
        engine.add(next(requests(f"alone-{i}", 1, chunk, 1)))
        chunk_s = timed_step(engine, 0, chunk)
        if i:  # the first round warms up
            alone.append(statistics.median(decode_s) * 1e3)
            mixed.append(mixed_s * 1e3)
            chunks.append(chunk_s * 1e3)
    sums = [a + b for a, b in zip(alone, chunks, strict=True)]
    return {
        "decodes_ms": report.spread(alone),
        "chunk_ms": report.spread(chunks),
        "mixed_ms": report.spread(mixed),
        "mixed_of_the_sum": report.spread([both / apart for both, apart in zip(mixed, sums, strict=True)], 3),
    }


def main() -> None:
    prefer_short_spin()
    arguments, began = parse(), report.environment()
    # In turns: with steps launched ahead, what a step holds was decided a step before.
    engine = Engine(EngineConfig(model_dir=str(ensure_demo_model()), enable_prefix_cache=False, overlap="off"))
    report.print_report(
        report.emit("mixed", vars(arguments) | {"operators": engine.facts.operators}, measure(engine, arguments), began)
    )


if __name__ == "__main__":
    main()
