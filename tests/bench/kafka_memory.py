"""Memory of the service under full load from Kafka, with its bounds hit on purpose: window, intake, admission.

    python -m tests.bench.kafka_memory [--minutes 10] [--window 64] [--intake 8000]

One Apache Kafka broker that always has more prompts than are taken, one service with the stand-in engine. The resident set of the service
process is sampled every two seconds; the slope is the least-squares line through the samples after the first minute. What the metrics
say about window and intake is compared with their limits.
"""

import argparse
import os
import re
import sys
import threading
import time
from typing import Any
from urllib.request import urlopen

import psutil
from confluent_kafka import Producer

from tests.bench import report
from tests.bench.kafka_load import Finished, create_topics, prompt
from tests.bench.served import serving
from tests.servers import kafka
from tests.servers.kafka import free_port

PARTITIONS = 6
SAMPLE_S = 2.0
AHEAD = 3_000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--intake", type=int, default=8_000)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--delivery", default="exactly_once")
    parser.add_argument("--warm-up", type=float, default=60.0, help="seconds before the slope begins")
    return parser.parse_args()


class Feed:
    """Keeps `AHEAD` prompts unfinished, in a thread."""

    def __init__(self, bootstrap: str, finished: Finished, new_tokens: int) -> None:
        self._producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 20, "log_level": 0})
        self._finished, self._new_tokens = finished, new_tokens
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.num_sent = 0

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            for _ in range(max(0, self._finished.count() + AHEAD - self.num_sent)):
                value = prompt(self.num_sent, num_words=40, max_tokens=self._new_tokens)
                self._producer.produce("sluice.prompts", value, partition=self.num_sent % PARTITIONS)
                self.num_sent += 1
                self._producer.poll(0)
            self._producer.flush(10)
            self._stopping.wait(0.5)


def gauges(admin: str, *names: str) -> dict[str, float]:
    """The largest value of each metric over its labels."""
    with urlopen(f"http://{admin}/metrics", timeout=5) as response:
        text = response.read().decode()
    found = {}
    for name in names:
        values = [float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)]
        # A partition's own appear with its first turn.
        found[name] = max(values, default=0.0)
    return found


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares: what the second grows by in one unit of the first."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    began = report.environment()
    group_id, admin = f"memory-{os.getpid()}", f"127.0.0.1:{free_port()}"
    with kafka.running("memory") as broker:
        create_topics(broker.bootstrap, partitions=PARTITIONS)
        finished = Finished(broker.bootstrap, partitions=PARTITIONS)
        flags = {
            "engine.kind": "stand-in",
            "kafka.bootstrap_servers": broker.bootstrap,
            "kafka.group_id": group_id,
            "kafka.delivery": arguments.delivery,
            "kafka.window_offsets": arguments.window,
            "kafka.intake_high_tokens": arguments.intake,
            "kafka.intake_low_tokens": arguments.intake // 2,
            "admin.port": admin.rpartition(":")[2],
        }
        with serving(*(part for name, value in flags.items() for part in ("--set", f"{name}={value}"))) as served:
            feed = Feed(broker.bootstrap, finished, arguments.new_tokens)
            feed.start()
            samples, peaks = _watch(served.process, admin, arguments)
            done = finished.total
            feed.close()
    if not all(peaks.values()):
        raise RuntimeError(f"/metrics never had one of {', '.join(peaks)}")
    steady = [(at_s / 600, rss) for at_s, rss in samples if at_s >= arguments.warm_up]
    results = {
        "rss_mib": report.spread([rss for _, rss in samples], 1) | {"blocks": [round(rss, 1) for _, rss in samples[::15]]},
        "slope_mib_per_10_min": round(slope(steady), 2),
        "prompts_done": done,
        "prompts_per_s": round(done / samples[-1][0], 1),
        "peaks": peaks,
        "limits": {"window_offsets": arguments.window, "intake_tokens": arguments.intake},
    }
    return report.emit("kafka_memory", vars(arguments), results, began)


def _watch(
    process: psutil.Process, admin: str, arguments: argparse.Namespace
) -> tuple[list[tuple[float, float]], dict[str, float]]:
    samples: list[tuple[float, float]] = []
    peaks: dict[str, float] = {}
    began = time.monotonic()
    while (now_s := time.monotonic() - began) < arguments.minutes * 60:
        samples.append((now_s, process.memory_info().rss / 2**20))
        for name, value in gauges(admin, "sluice_kafka_window_used", "sluice_kafka_intake_tokens").items():
            peaks[name] = max(peaks.get(name, 0.0), value)
        if len(samples) % 30 == 0:
            print(f"{now_s:.0f} s: {samples[-1][1]:.1f} MiB, {peaks}", file=sys.stderr, flush=True)
        time.sleep(SAMPLE_S)
    return samples, peaks


if __name__ == "__main__":
    report.print_report(measure(parse()))
