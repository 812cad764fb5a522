"""One transport on a real broker with topics of its own, and a second client library to look at what it wrote."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from service.config import KafkaSection, TracingSection
from service.kafka import KafkaTransport, Topics
from service.kafka.budget import QueueClass
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import Tracing
from tests.service.kafka.fakes import FakeGeneration


@dataclass
class Broker:
    """A broker with fresh topics under a prefix of its own."""

    bootstrap: str
    partitions: int = 2
    prefix: str = field(default_factory=lambda: f"t{uuid.uuid4().hex[:10]}.")
    max_result_bytes: int = 1_048_588
    """What the results topic takes; a change of it later would reach the broker at its own time."""

    def __post_init__(self) -> None:
        self.topics = Topics(self.prefix)
        admin = AdminClient({"bootstrap.servers": self.bootstrap})
        limits = {self.topics.results: {"max.message.bytes": str(self.max_result_bytes)}}
        topics = [NewTopic(name, self.partitions, 1, config=limits.get(name, {})) for name in self.topics.required]
        for future in admin.create_topics(topics).values():
            future.result(30)
        self._producer = Producer({"bootstrap.servers": self.bootstrap, "linger.ms": 0})

    def section(self, **changes: Any) -> KafkaSection:
        """Settings that make a test quick."""
        quick = {"heartbeat_interval_ms": 200, "session_timeout_ms": 6_000}
        return KafkaSection(
            bootstrap_servers=self.bootstrap, group_id=self.prefix + "group", topic_prefix=self.prefix, **{**quick, **changes}
        )

    async def publish(self, *values: bytes | None, partition: int = 0, headers: dict[str, bytes] | None = None) -> None:
        """Writes prompt records, in order."""
        for value in values:
            self._producer.produce(self.topics.prompts, value, partition=partition, headers=dict(headers or {}))
        left = await asyncio.to_thread(self._producer.flush, 20)
        assert left == 0

    async def say(self, *texts: str, partition: int = 0, headers: dict[str, bytes] | None = None) -> None:
        """Writes text prompts."""
        await self.publish(*(json.dumps({"prompt": text}).encode() for text in texts), partition=partition, headers=headers)

    async def read(self, topic: str, *, count: int, within_s: float = 30.0) -> list[Any]:
        """The first records of a topic: at least `count`, and all there are then. Fails when they do not come in time."""
        found: list[Any] = []
        async with asyncio.timeout(within_s):
            while len(found) < count:
                found = await asyncio.to_thread(self.read_now, topic)
        return found

    async def results(self, count: int, **bound: float) -> list[dict[str, Any]]:
        """The result records as JSON."""
        return [json.loads(record.value()) for record in await self.read(self.topics.results, count=count, **bound)]

    def read_now(self, topic: str) -> list[Any]:
        """All committed records of a topic; blocks. None of a topic that is too young to have a leader."""
        consumer = Consumer(
            {
                "bootstrap.servers": self.bootstrap,
                "group.id": "unused",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
                # That a partition is at its end is the answer to a fetch that found nothing.
                "fetch.wait.max.ms": 10,
                "log_level": 0,
            }
        )
        found: list[Any] = []
        unread = set(range(self.partitions))
        try:
            # Where it does not know the leaders yet, librdkafka looks for a partition's beginning half a second later.
            consumer.list_topics(topic, timeout=20)
            consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in unread])
            while unread:
                record = consumer.poll(5.0)
                if record is None:
                    break
                if record.error() is None:
                    found.append(record)
                elif record.error().code() == KafkaError._PARTITION_EOF:
                    unread.discard(record.partition())
                else:
                    # A topic this young may have no leader yet.
                    assert record.error().retriable() or record.error().code() == KafkaError.UNKNOWN_TOPIC_OR_PART
                    return []
        finally:
            consumer.close()
        return found


def make_class_topics(broker: Broker, *names: QueueClass) -> None:
    """Class topics; they may have no leader yet."""
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    topics = [NewTopic(broker.topics.of_class(name), broker.partitions, 1) for name in names]
    for future in admin.create_topics(topics).values():
        future.result(30)


@asynccontextmanager
async def serving(
    section: KafkaSection, generation: FakeGeneration, *, wait: bool = True, drain: bool = True, **options: Any
) -> AsyncIterator[KafkaTransport]:
    """A transport that has its partitions; drained at the end (`drain` False: cut off as by a crash)."""
    transport = KafkaTransport(
        section,
        generation,
        spans=options.pop("spans", None) or Tracing(TracingSection()),
        metrics=(options.pop("metrics", None) or Metrics()).kafka,
        **options,
    )
    await transport.start()
    try:
        if wait:
            await eventually(lambda: transport.status().partitions > 0)
        yield transport
    finally:
        if drain:
            await transport.close()
        else:
            await crash(transport)


async def crash(transport: KafkaTransport) -> None:
    """Ends a transport without flush, commit or leave: what a killed process leaves behind, but for its open sockets."""
    tasks, transport._tasks = transport._tasks, set()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await transport._stop()


async def eventually(condition: Callable[[], bool], *, within_s: float = 30.0) -> None:
    """Waits for a condition, with a bound."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.02)
