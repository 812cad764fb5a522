"""Prompts a second through the Kafka path without an engine's work: exactly once, at least once, and a bare aiokafka loop beside them.

    python -m tests.bench.kafka_path [--prompts 6000] [--new-tokens 64] [--blocks 3] [--modes exactly-once at-least-once bare-…]

One Apache Kafka broker, six partitions, one service process with the stand-in engine as its child. Each block has fresh topics and all
prompts on them before the process starts; the clock runs from 20 % of the results visible to a read_committed reader to all. CPU is
the service's own process (and the engine child's apart), over the same time. Texts are tokenised by the demo model's tokenizer, 1 %
of traces go to a real Jaeger. Everything shares the machine's cores.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import psutil

from tests.bench import report
from tests.bench.kafka_load import Finished, cpu_s, create_topics, prompt, publish
from tests.bench.served import serving
from tests.servers import jaeger, kafka
from tests.servers.tied import tie

MODES = ("exactly-once", "at-least-once", "bare-exactly-once", "bare-at-least-once")
RECORDS_A_PROMPT, BARE_RECORDS_A_PROMPT = 6, 5
"""Started, four chunks of 16 tokens, result. The bare loop says nothing of a start."""

TIMEOUT_S = 240.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=report.at_least(1), default=6_000)
    parser.add_argument("--new-tokens", type=report.at_least(1), default=64)
    parser.add_argument("--words", type=report.at_least(1), default=40)
    parser.add_argument("--partitions", type=report.at_least(1), default=6)
    parser.add_argument("--blocks", type=report.at_least(1), default=3)
    parser.add_argument("--sample-ratio", type=float, default=0.01, help="0: no Jaeger")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--set", action="append", default=[], help="a setting of the service")
    return parser.parse_args()


@contextmanager
def bare(bootstrap: str, group: str, mode: str) -> Iterator[psutil.Process]:
    """The bare loop."""
    arguments = ["--brokers", bootstrap, "--group", group, "--mode", mode.removeprefix("bare-")]
    process = subprocess.Popen([sys.executable, "-m", "tests.bench.kafka_bare", *arguments])
    tie(process.pid)
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def served(bootstrap: str, group: str, mode: str, otlp: str, arguments: argparse.Namespace) -> Iterator[psutil.Process]:
    """`sluice serve`."""
    values = {
        "engine.kind": "stand-in",
        "kafka.bootstrap_servers": bootstrap,
        "kafka.group_id": group,
        "kafka.delivery": mode.replace("-", "_"),
        "tracing.otlp_endpoint": otlp,
        "tracing.sample_ratio": arguments.sample_ratio,
    }
    sets = [f"{name}={value}" for name, value in values.items() if value != ""] + arguments.set
    with serving(*(part for one in sets for part in ("--set", one))) as running:
        yield running.process


def block(bootstrap: str, group: str, mode: str, otlp: str, arguments: argparse.Namespace) -> dict[str, float]:
    """One block of one mode."""
    count = arguments.prompts
    create_topics(bootstrap, partitions=arguments.partitions)
    publish(
        bootstrap,
        lambda index: prompt(index, num_words=arguments.words, max_tokens=arguments.new_tokens),
        count=count,
        partitions=arguments.partitions,
    )
    finished = Finished(bootstrap, partitions=arguments.partitions)
    running = bare(bootstrap, group, mode) if mode.startswith("bare") else served(bootstrap, group, mode, otlp, arguments)
    with running as process:
        began = finished.reach(count // 5, timeout_s=TIMEOUT_S)
        first, cpu = finished.total, cpu_s(process)
        children = sum(cpu_s(child) for child in process.children())
        ended = finished.reach(count, timeout_s=TIMEOUT_S)
        done = count - first
        return {
            "prompts_per_s": done / (ended - began),
            "cpu_us_per_prompt": (cpu_s(process) - cpu) / done * 1e6,
            "child_cpu_us_per_prompt": (sum(cpu_s(child) for child in process.children()) - children) / done * 1e6,
            "rss_mib": process.memory_info().rss / 2**20,
        }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    began = report.environment()
    blocks: dict[str, list[dict[str, float]]] = {mode: [] for mode in arguments.modes}
    tracing = jaeger.running() if arguments.sample_ratio else nullcontext(None)
    with kafka.running("bench") as broker, tracing as traced:
        otlp = traced.otlp_endpoint if traced is not None else ""
        for number in range(arguments.blocks):
            for mode in arguments.modes:
                print(f"block {number + 1}, {mode} …", file=sys.stderr, flush=True)
                blocks[mode].append(block(broker.bootstrap, f"bench-{mode}-{number}-{os.getpid()}", mode, otlp, arguments))
                print(f"  {blocks[mode][-1]}", file=sys.stderr, flush=True)
    results: dict[str, Any] = {}
    for mode, found in blocks.items():
        results[mode] = {name: report.spread([one[name] for one in found], 1) for name in found[0]}
        records = BARE_RECORDS_A_PROMPT if mode.startswith("bare-") else RECORDS_A_PROMPT
        results[mode]["records_per_s"] = report.spread([one["prompts_per_s"] * records for one in found], 0)
    if {"exactly-once", "at-least-once"} <= set(blocks):
        pairs = zip(blocks["exactly-once"], blocks["at-least-once"], strict=True)
        ratios = [mine["prompts_per_s"] / base["prompts_per_s"] for mine, base in pairs]
        results["exactly_once_against_at_least_once"] = report.spread(ratios, 3)
    return report.emit("kafka_path", vars(arguments), results | {"probe": report.probe()}, began)


if __name__ == "__main__":
    report.print_report(measure(parse()))
