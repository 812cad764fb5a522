"""What the benchmarks of the Kafka path share: topics with prompts in them, and how many results have come."""

import json
import random
import time
from collections.abc import Callable

import psutil
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from tests.chaos.recorder import consumer

TOPICS = ("prompts", "results", "chunks", "dlq", "control")
_WORDS = (
    "the", "river", "runs", "past", "stone", "and", "field", "where", "many", "people", "walk", "under", "old", "trees", "talk",
    "about", "water", "light", "bread",
)  # fmt: skip


def create_topics(bootstrap: str, *, partitions: int, prefix: str = "sluice.") -> None:
    """Fresh topics: those of an earlier block are deleted first."""
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    names = [prefix + name for name in TOPICS]
    there = [name for name in names if name in admin.list_topics(timeout=10).topics]
    if there:
        for future in admin.delete_topics(there, operation_timeout=30).values():
            future.result(30)
        while set(there) & set(admin.list_topics(timeout=10).topics):
            time.sleep(0.1)
    wanted = [NewTopic(name, partitions, 1, config={"message.timestamp.type": "LogAppendTime"}) for name in names]
    for future in admin.create_topics(wanted, operation_timeout=30).values():
        future.result(30)


def prompt(index: int, *, num_words: int, max_tokens: int) -> bytes:
    """A text prompt as JSON, drawn from its index."""
    draw = random.Random(index)
    text = " ".join(draw.choices(_WORDS, k=num_words))
    sampling = {"max_tokens": max_tokens, "seed": index, "ignore_eos": True}
    return json.dumps({"prompt": text, "sampling": sampling, "label": f"bench-{index}"}).encode()


def publish(
    bootstrap: str, value: Callable[[int], bytes], *, count: int, partitions: int, topic: str = "sluice.prompts"
) -> None:
    """`count` prompts, evenly over the partitions; returns once all are acknowledged."""
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 20, "enable.idempotence": True, "log_level": 0})
    for index in range(count):
        while True:
            try:
                producer.produce(topic, value(index), partition=index % partitions)
            except BufferError:
                producer.poll(0.1)
                continue
            break
        producer.poll(0)
    if left := producer.flush(120):
        raise RuntimeError(f"{left} prompts were not taken by the broker")


class Finished:
    """Counts the results that a read_committed reader is shown. (The group's offsets would do as well, but the client crashes on
    their metadata: confluent-kafka 2.16 takes it for a C string.)
    """

    def __init__(self, bootstrap: str, *, partitions: int, topic: str = "sluice.results") -> None:
        self._reader = consumer(bootstrap, isolation="read_committed")
        self._reader.assign([TopicPartition(topic, partition, 0) for partition in range(partitions)])
        self.total = 0

    def count(self, wait_s: float = 0.0) -> int:
        """All so far, after taking in what has come."""
        while messages := self._reader.consume(5_000, wait_s):
            self.total += sum(message.error() is None for message in messages)
            wait_s = 0.0
        return self.total

    def reach(self, count: int, *, timeout_s: float) -> float:
        """`time.perf_counter()` once `count` is reached. Raises TimeoutError."""
        deadline = time.perf_counter() + timeout_s
        while self.count(0.05) < count:
            if time.perf_counter() > deadline:
                raise TimeoutError(f"{self.total} of {count} results came within {timeout_s:g} s")
        return time.perf_counter()

    def close(self) -> None:
        self._reader.close()


def cpu_s(process: psutil.Process) -> float:
    """User and system seconds so far."""
    times = process.cpu_times()
    return float(times.user + times.system)
