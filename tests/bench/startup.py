"""From exec to ready, what an idle service costs, and its memory.

    python -m tests.bench.startup [--starts 3] [--idle-s 10]

Ready beyond loading is exec-to-ready less the engine's own loading time. The first request is one of 64 tokens, over gRPC. Memory is
proportional set size, idle and after 32 more requests, 16 at a time; the engine's is shown less its weight files and its KV cache, which
the configuration decides.
"""

import argparse
import time
from typing import Any

from service.cli.demo_model import ensure_demo_model
from tests.bench import report
from tests.bench.load_run import fixed, plan, run_load
from tests.bench.served import Served, model_bytes, resident_bytes, serving

KV_BYTES = 60 * 2**20
"""2 MiB a layer: an engine takes the first pages ahead (Linux from 5.14), so all of it is resident."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=report.at_least(1), default=3)
    parser.add_argument("--idle-s", type=report.above_zero, default=10.0)
    return parser.parse_args()


def cpu_seconds(served: Served) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in (served.process, served.child))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    began = report.environment()
    known = model_bytes(ensure_demo_model()) + KV_BYTES

    def beside(served: Served) -> float:
        return (resident_bytes(served.child) - known) / 2**20

    ready, load, beyond, idle = [], [], [], []
    first_token: list[float] = []
    parents, engines, busy = [], [], []
    for _ in range(arguments.starts):
        with serving("--embedded", "--brokers", "127.0.0.1:0", "--set", f"engine.kv_cache_bytes={KV_BYTES}") as served:
            ready.append(served.ready_s)
            load.append(served.load_s)
            beyond.append(served.ready_s - served.load_s)
            time.sleep(2)  # what a start leaves behind (joining the group, the first spans) is no idling
            before = cpu_seconds(served)
            time.sleep(arguments.idle_s)
            idle.append((cpu_seconds(served) - before) / arguments.idle_s * 100)
            parents.append(resident_bytes(served.process) / 2**20)
            engines.append(beside(served))
            [alone], _ = run_load(served, "grpc", plan(fixed(64, 2), requests=1, concurrency=1), "first")
            first_token.append(alone.summary.as_json()["ttft_ms"]["p50"])
            run_load(served, "grpc", plan(fixed(64, 32), requests=32, concurrency=16), "memory")
            busy.append(beside(served))
    results = {
        "ready_s": report.spread(ready),
        "load_s": report.spread(load),
        "ready_beyond_loading_s": report.spread(beyond),
        "idle_percent_of_a_core": report.spread(idle),
        "first_token_of_the_first_request_ms": report.spread(first_token),
        "parent_mib": max(parents),
        "engine_beside_weights_and_kv_mib": {"idle": report.spread(engines, 0), "after_requests": report.spread(busy, 0)},
    }
    return report.emit("startup", vars(arguments) | {"kv_cache_bytes": KV_BYTES}, results, began)


if __name__ == "__main__":
    report.print_report(measure(parse()))
