"""What the service costs by itself: the stand-in engine at a fast engine's pace, so that nothing but the service works.

    python -m tests.bench.service_overhead [--tokens-per-s 94] [--concurrent 16] [--requests 96] [--blocks 3]

CPU time of the service's own process an output token, in a closed loop over gRPC and over Kafka (real broker), blocks interleaved; then
the time to the first token of one request at a time, which is all the service's, since the stand-in says its first token at once; over
Kafka two hops of it are the broker's, and the same two hops without Sluice stand beside it. These come last, when the broker is warm.
"""

import argparse
from typing import Any

from service.cli.demo_model import ensure_demo_model
from tests.bench import report
from tests.bench.kafka_echo import two_hops_ms
from tests.bench.load_run import TRANSPORTS, fixed, plan, run_load
from tests.bench.served import BROKER, resident_bytes, serving, small_broker


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens-per-s", type=float, default=94.0, help="of one sequence")
    parser.add_argument("--concurrent", type=report.at_least(1), default=16)
    parser.add_argument("--requests", type=report.at_least(1), default=96)
    parser.add_argument("--prompt-tokens", type=report.at_least(1), default=64)
    parser.add_argument("--new-tokens", type=report.at_least(1), default=64)
    parser.add_argument("--alone", type=report.at_least(1), default=100)
    parser.add_argument("--blocks", type=report.at_least(1), default=3)
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    began = report.environment()
    ensure_demo_model()
    stand_in = ("engine.kind=stand-in", f"engine.stand_in_tokens_per_s={arguments.tokens_per_s}", "kafka.create_topics=true")
    flags = [part for setting in stand_in for part in ("--set", setting)]
    load = plan(
        fixed(arguments.prompt_tokens, arguments.new_tokens),
        requests=arguments.requests,
        concurrency=arguments.concurrent,
        warm_up=arguments.concurrent,
    )
    alone = plan(fixed(arguments.prompt_tokens, 2), requests=arguments.alone, concurrency=1, warm_up=4)
    spent: dict[str, dict[str, list[float]]] = {name: {} for name in TRANSPORTS}
    rates: dict[str, list[float]] = {name: [] for name in TRANSPORTS}
    first: dict[str, Any] = {}
    with small_broker() as broker, serving("--brokers", broker.bootstrap, *flags) as served:
        for block in range(arguments.blocks):
            for name in TRANSPORTS:
                [run], cost = run_load(served, name, load, f"{name} {block}", broker.pid)
                rates[name].append(run.summary.output_tokens_per_s)
                for who, spent_us in cost.beside_engine().items():
                    spent[name].setdefault(who, []).append(spent_us)
        for name in TRANSPORTS:
            [run], _ = run_load(served, name, alone, f"alone {name}")
            first[name] = run.summary.as_json()["ttft_ms"]
        hops = two_hops_ms(broker.bootstrap, arguments.alone)
        parent = resident_bytes(served.process)
    results = {
        "cpu_us_a_token": {
            name: {who: report.spread(values) for who, values in costs.items()} for name, costs in spent.items()
        },
        "tokens_per_s": {name: report.spread(values) for name, values in rates.items()},
        "ttft_ms_alone": first,
        "two_hops_without_sluice_ms": hops,
        "parent_mib_after": round(parent / 2**20),
    }
    return report.emit("service_overhead", vars(arguments) | BROKER, results, began)


if __name__ == "__main__":
    report.print_report(measure(parse()))
