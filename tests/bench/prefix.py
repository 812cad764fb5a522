"""Time to the first token with and without a cached prefix.

    python -m tests.bench.prefix [--prompt-tokens 2048] [--shared 0.9] [--blocks 5]

A warm request shares the first `shared` of its prompt with one that ran before; a cold one shares nothing. Cold and warm alternate.
"""

import argparse
import random
from typing import Any

from engine import Engine, EngineConfig, Request, SamplingParams
from service.cli.demo_model import ensure_demo_model
from tests.bench import report


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--prompt-tokens", type=report.at_least(1), default=2048)
    parser.add_argument("--shared", type=float, default=0.9)
    parser.add_argument("--blocks", type=report.at_least(1), default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def first_token_ms(engine: Engine, name: str, prompt: list[int]) -> tuple[float, int]:
    """Milliseconds from `add` to the first token, and the prompt tokens that came from the cache."""
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0, ignore_eos=True)
    cached = 0

    def run() -> None:
        nonlocal cached
        engine.add(Request(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling))
        while True:
            for output in engine.step().every():
                if output.facts is not None:
                    cached = output.facts.num_cached_tokens
                if output.token_ids:
                    return

    return report.seconds(run) * 1e3, cached


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    began = report.environment()
    engine = Engine(EngineConfig(model_dir=arguments.model or str(ensure_demo_model())))
    draw = random.Random(arguments.seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(1000, 40_000) for _ in range(count)]

    shared = tokens(int(arguments.prompt_tokens * arguments.shared))
    own = arguments.prompt_tokens - len(shared)
    first_token_ms(engine, "warm-up", shared + tokens(own))
    cold, warm, cached = [], [], []
    for i in range(arguments.blocks):
        cold.append(first_token_ms(engine, f"cold-{i}", tokens(arguments.prompt_tokens))[0])
        took, hit = first_token_ms(engine, f"warm-{i}", shared + tokens(own))
        warm.append(took)
        cached.append(hit)
    cuts = [1 - after / before for before, after in zip(cold, warm, strict=True)]
    results = {
        "ttft_cold_ms": report.spread(cold),
        "ttft_warm_ms": report.spread(warm),
        "cut": report.spread(cuts, 3),
        "cached_tokens": report.spread(cached, 0),
    }
    return report.emit("prefix", vars(arguments), results | {"probe": report.probe()}, began)


if __name__ == "__main__":
    report.print_report(measure(parse()))
