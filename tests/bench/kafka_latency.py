"""From a request's last token to its result before a read_committed reader: exactly once beside at least once, in interleaved blocks.

    python -m tests.bench.kafka_latency [--rate 50] [--seconds 20] [--blocks 3] [--tokens-per-s 100]

One Apache Kafka broker, one service with the stand-in engine, prompts at an even rate. The last token's moment is the `time` of its chunk
record (this machine's clock, set as the record is handed over); the result's is when librdkafka gives it to this process. A broker
that has just started runs its first thousands of requests before they are compiled: the first block of each mode is `cold`, by itself.
"""

import argparse
import json
import os
import sys
import threading
import time
from datetime import datetime
from typing import Any

from confluent_kafka import Producer, TopicPartition

from tests.bench import report
from tests.bench.kafka_load import create_topics, prompt
from tests.bench.served import serving
from tests.chaos.recorder import consumer, read_all
from tests.servers import kafka

PARTITIONS = 6
MODES = ("exactly-once", "at-least-once")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--new-tokens", type=report.at_least(1), default=64)
    parser.add_argument("--tokens-per-s", type=float, default=100.0)
    parser.add_argument("--blocks", type=report.at_least(2), default=3, help="at least 2: the first one is the cold one")
    arguments = parser.parse_args()
    if arguments.blocks < 2:
        parser.error("--blocks: at least 2")
    return arguments


class Results:
    """Reads results as they become visible, in a thread; `at` is by request id, in seconds since the epoch."""

    def __init__(self, bootstrap: str) -> None:
        self._reader = consumer(bootstrap, isolation="read_committed")
        self._reader.assign([TopicPartition("sluice.results", partition, 0) for partition in range(PARTITIONS)])
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.at: dict[str, float] = {}

    def wait(self, count: int, timeout_s: float) -> None:
        """Until so many came. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while len(self.at) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self.at)} of {count} results came within {timeout_s:g} s")
            time.sleep(0.05)

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._reader.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            message = self._reader.poll(0.1)
            if message is not None and message.error() is None:
                self.at[message.key().decode()] = time.time()


def publish_evenly(bootstrap: str, count: int, rate: float, new_tokens: int) -> None:
    """Prompts at an even rate."""
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0, "log_level": 0})
    began = time.monotonic()
    for index in range(count):
        while (wait_s := began + index / rate - time.monotonic()) > 0:
            producer.poll(min(wait_s, 0.05))
        producer.produce("sluice.prompts", prompt(index, num_words=20, max_tokens=new_tokens), partition=index % PARTITIONS)
    producer.flush(30)


def last_tokens(bootstrap: str) -> dict[str, float]:
    """When each request's last chunk was written, in seconds since the epoch."""
    found: dict[str, float] = {}
    for message in read_all(bootstrap, "sluice.chunks", isolation="read_uncommitted"):
        value = json.loads(message.value())
        if "seq" in value or "token_ids" in value:
            at_s = datetime.fromisoformat(value["time"]).timestamp()
            found[message.key().decode()] = max(at_s, found.get(message.key().decode(), 0.0))
    return found


def block(bootstrap: str, mode: str, number: int, arguments: argparse.Namespace) -> list[float]:
    """Milliseconds of each request."""
    create_topics(bootstrap, partitions=PARTITIONS)
    count = int(arguments.rate * arguments.seconds)
    flags = {
        "engine.kind": "stand-in",
        "engine.stand_in_tokens_per_s": arguments.tokens_per_s,
        "kafka.bootstrap_servers": bootstrap,
        "kafka.group_id": f"latency-{mode}-{number}-{os.getpid()}",
        "kafka.delivery": mode.replace("-", "_"),
    }
    with serving(*(part for name, value in flags.items() for part in ("--set", f"{name}={value}"))):
        results = Results(bootstrap)
        try:
            publish_evenly(bootstrap, count, arguments.rate, arguments.new_tokens)
            results.wait(count, 60.0)
        finally:
            results.close()
    said = last_tokens(bootstrap)
    # The first second has the group's start in it.
    began = min(said.values()) + 1.0
    return [(results.at[name] - at_s) * 1_000 for name, at_s in said.items() if at_s > began]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    began = report.environment()
    found: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    with kafka.running("latency") as broker:
        for number in range(arguments.blocks):
            for mode in MODES:
                print(f"block {number + 1}, {mode} …", file=sys.stderr, flush=True)
                found[mode].append(block(broker.bootstrap, mode, number, arguments))
    results = {
        mode: {
            "last_token_to_visible_ms": report.quantiles([value for one in warm for value in one], 1),
            "blocks": [report.quantiles(one, 1) for one in warm],
            "cold": report.quantiles(cold, 1),
            "requests": sum(map(len, warm)),
        }
        for mode, (cold, *warm) in found.items()
    }
    return report.emit("kafka_latency", vars(arguments), results | {"probe": report.probe()}, began)


if __name__ == "__main__":
    report.print_report(measure(parse()))
