"""Output tokens a second through the whole service, against the engine offline, in one interleaved run.

    python -m tests.bench.service [--concurrent 16] [--requests 48] [--prompt-tokens 64] [--new-tokens 32] [--blocks 5] [--warm-up 240]

Closed loop: as many requests in flight as `concurrent`, the next one when one ends. Offline: `Engine` stepped in this process.
gRPC: `Stream` calls of the client library. Kafka: prompt records in, chunks and result records out, on a real Apache Kafka broker on
the same machine. The load generator and the broker share the cores with the service: these figures hold for that; what each cost
stands beside them. `--warm-up` requests of each transport come before the blocks: a broker's JVM that has just started takes three times
the processor time of one that has compiled what it runs.
"""

import argparse
import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from typing import Any

from engine import Engine, EngineConfig, Request, SamplingParams
from engine.openmp import prefer_short_spin
from service.cli.demo_model import ensure_demo_model
from service.tokenization import Tokenization
from tests.bench import report
from tests.bench.load_run import TRANSPORTS, fixed, plan, run_load
from tests.bench.served import BROKER, Served, resident_bytes, serving, small_broker

Prompts = list[tuple[int, ...]]
KV_BYTES = 256 * 2**20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrent", type=report.at_least(1), default=16)
    parser.add_argument("--requests", type=report.at_least(1), default=48)
    parser.add_argument("--prompt-tokens", type=report.at_least(1), default=64)
    parser.add_argument("--new-tokens", type=report.at_least(1), default=32)
    parser.add_argument("--blocks", type=report.at_least(1), default=5)
    parser.add_argument("--warm-up", type=report.at_least(0), default=240)
    return parser.parse_args()


def offline(engine: Engine, prompts: Prompts, arguments: argparse.Namespace, block: int) -> float:
    """Seconds for all prompts."""
    sampling = SamplingParams(max_tokens=arguments.new_tokens, seed=0, temperature=0.0, ignore_eos=True)
    waiting = [Request(request_id=f"{block}-{i}", prompt_token_ids=ids, sampling=sampling) for i, ids in enumerate(prompts)]
    start, running, ended = time.perf_counter(), 0, 0
    while ended < len(prompts):
        while waiting and running < arguments.concurrent:
            engine.add(waiting.pop())
            running += 1
        done = sum(output.finish_reason is not None for output in engine.step().every())
        running, ended = running - done, ended + done
    return time.perf_counter() - start


def tokenized(tokenization: Tokenization, arguments: argparse.Namespace, seed: str, count: int) -> Prompts:
    """So many texts of a load as the service would tokenise them."""
    load = fixed(arguments.prompt_tokens, arguments.new_tokens)
    texts = itertools.islice(load.requests(lambda stream: random.Random(f"{seed} {stream}").random, "offline"), count)

    async def encode() -> Prompts:
        return [await tokenization.encode_text(planned.text) for planned in texts]

    return asyncio.run(encode())


def compare(
    engine: Engine,
    tokenization: Tokenization,
    served: Served,
    arguments: argparse.Namespace,
    *,
    transports: Sequence[str] = TRANSPORTS,
    seed: str = "",
    broker_pid: int | None = None,
) -> dict[str, Any]:
    """Rates of the engine offline and through the service, blocks interleaved, their ratios, and what each cost.

    Prompts of another `seed` are others: what was compared before is in no prefix cache.
    """
    equal = fixed(arguments.prompt_tokens, arguments.new_tokens)
    tokens = arguments.requests * arguments.new_tokens
    rates: dict[str, list[float]] = {"offline": [], **{name: [] for name in transports}}
    costs: dict[str, dict[str, list[float]]] = {name: {} for name in transports}
    for block in range(-1 if arguments.warm_up else 0, arguments.blocks):
        warms_up = block < 0
        load = plan(equal, requests=arguments.warm_up if warms_up else arguments.requests, concurrency=arguments.concurrent)
        prompts = tokenized(
            tokenization, arguments, f"{seed}offline {block}", arguments.concurrent if warms_up else arguments.requests
        )
        took = offline(engine, prompts, arguments, block)
        runs = {name: run_load(served, name, load, f"{seed}{name} {block}", broker_pid) for name in transports}
        if warms_up:
            continue
        rates["offline"].append(tokens / took)
        for name, ([run], cost) in runs.items():
            rates[name].append(run.summary.output_tokens_per_s)
            for who, spent_us in cost.beside_engine().items():
                costs[name].setdefault(who, []).append(spent_us)
    results: dict[str, Any] = {"tokens_per_s": {name: report.spread(values) for name, values in rates.items()}}
    for name in transports:
        ratios = [mine / base for mine, base in zip(rates[name], rates["offline"], strict=True)]
        results[f"{name}_against_offline"] = report.spread(ratios)
    results["cpu_us_a_token"] = {
        name: {who: report.spread(values) for who, values in spent.items()} for name, spent in costs.items()
    }
    return results


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    began = report.environment()
    prefer_short_spin()
    model = ensure_demo_model()
    with (
        small_broker() as broker,
        serving(
            "--brokers", broker.bootstrap, "--set", "kafka.create_topics=true", "--set", f"engine.kv_cache_bytes={KV_BYTES}"
        ) as served,
    ):
        engine = Engine(EngineConfig(model_dir=str(model), kv_cache_bytes=KV_BYTES))
        results = compare(engine, Tokenization(model), served, arguments, broker_pid=broker.pid)
        memory = resident_bytes(served.process)
    results["parent_mib_after"] = round(memory / 2**20)
    return report.emit("service", vars(arguments) | BROKER, results | {"probe": report.probe()}, began)


if __name__ == "__main__":
    report.print_report(measure(parse()))
