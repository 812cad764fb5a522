"""Latency of the served model: what the service adds to the first token, and equal requests from light to heavy load.

    python -m tests.bench.service_load [--alone 200] [--level-s 20] [--loads 0.1,0.3,0.5,0.7,0.9] [--concurrent 16] [--deadline-s 3]

Added TTFT: one request at a time on an otherwise idle service; from sending to the first token at the client, less the engine's own
part (first scheduled to first token, which each answer tells). The sweep: a closed loop finds what `concurrent` in flight reach, then
Poisson arrivals at shares of that rate, latency from the instant at which a request was due. E-TPS and goodput of the sweep count
requests that took no longer than the deadline, the same on every machine: twice the p99 of 16 in flight on two cores of Zen 4 (1.6 s,
27 November 2026). The service is not told of it. Spread lengths go last, in a closed loop.
"""

import argparse
from dataclasses import asdict
from typing import Any

from engine.openmp import prefer_short_spin
from service.bench.lengths import Lengths
from service.bench.summary import Summary, Targets
from service.bench.workload import Workload
from tests.bench import report
from tests.bench.load_run import TRANSPORTS, fixed, plan, run_load
from tests.bench.served import BROKER, resident_bytes, serving, small_broker


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alone", type=report.at_least(1), default=200)
    parser.add_argument("--level-s", type=report.above_zero, default=20.0)
    parser.add_argument("--loads", default="0.1,0.3,0.5,0.7,0.9")
    parser.add_argument("--deadline-s", type=report.above_zero, default=3.0)
    parser.add_argument("--concurrent", type=report.at_least(1), default=16)
    parser.add_argument("--prompt-tokens", type=report.at_least(1), default=64)
    parser.add_argument("--new-tokens", type=report.at_least(1), default=32)
    return parser.parse_args()


def figures(summary: Summary) -> dict[str, Any]:
    """What a reader compares."""
    found = summary.as_json()
    names = (
        "num_finished",
        "requests_per_s",
        "output_tokens_per_s",
        "e_tps",
        "goodput_per_s",
        "ttft_ms",
        "tpot_ms",
        "e2e_ms",
        "p99_over_median",
        "late_ms",
    )
    return {name: found[name] for name in names}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    began = report.environment()
    prefer_short_spin()
    equal = fixed(arguments.prompt_tokens, arguments.new_tokens)
    loads = tuple(float(load) for load in arguments.loads.split(","))
    results: dict[str, Any] = {"added_ttft_ms": {}, "spread_lengths": {}}
    with (
        small_broker() as broker,
        serving("--brokers", broker.bootstrap, "--set", "kafka.create_topics=true") as served,
    ):
        alone = plan(fixed(arguments.prompt_tokens, 2), requests=arguments.alone, concurrency=1, warm_up=4)
        for transport in TRANSPORTS:
            # A broker that has just started takes three times as long.
            warm = plan(equal, requests=4 * arguments.concurrent, concurrency=arguments.concurrent)
            run_load(served, transport, warm, f"warm {transport}")
            [run], _ = run_load(served, transport, alone, f"alone {transport}")
            added = run.summary.added_ttft_ms
            results["added_ttft_ms"][transport] = asdict(added) if added else None
        sweep = plan(
            equal,
            duration_s=arguments.level_s,
            concurrency=arguments.concurrent,
            loads=loads,
            warm_up=arguments.concurrent,
            targets=Targets(deadline_s=arguments.deadline_s),
        )
        (closed, *levels), _ = run_load(served, "grpc", sweep, "sweep")
        results["closed_loop"] = figures(closed.summary)
        results["by_load"] = {f"{level.load:.0%}": figures(level.summary) for level in levels}
        results["worst_p99_over_median"] = max(level.summary.p99_over_median or 0.0 for level in levels)
        for shape in ("sharegpt", "powerlaw"):
            lengths = Lengths(shape=shape, prompt_tokens=arguments.prompt_tokens, output_tokens=arguments.new_tokens)
            spread = plan(Workload(lengths=lengths), duration_s=arguments.level_s, concurrency=arguments.concurrent)
            [run], _ = run_load(served, "grpc", spread, shape)
            results["spread_lengths"][shape] = figures(run.summary)
        results["parent_mib_after"] = round(resident_bytes(served.process) / 2**20)
    return report.emit("service_load", vars(arguments) | BROKER, results | {"probe": report.probe()}, began)


if __name__ == "__main__":
    report.print_report(measure(parse()))
