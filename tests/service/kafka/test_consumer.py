"""A commit that a rebalance overtakes is given up: under the next generation it could be another owner's partition."""

import asyncio
from typing import Any

import pytest
from aiokafka.errors import CommitFailedError

from service.config import KafkaSection
from service.kafka.budget import IntakeBudget
from service.kafka.committer import Committer
from service.kafka.consumer import PromptConsumer
from service.kafka.ownership import Partitions
from service.kafka.records import TopicPartition
from service.kafka.result_keys import ResultKeys
from service.kafka.resume import ChunkReading
from service.kafka.topics import Topics
from service.telemetry.metrics import Metrics
from tests.service.kafka.fakes import FakeOutput, until


class HungGroup:
    """A client whose commit never comes back: it tries again and again."""

    def __init__(self) -> None:
        self.trying = 0

    async def commit(self, points: Any) -> None:
        self.trying += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.trying -= 1


def consumer_of(group: Any) -> PromptConsumer:
    async def no_topics(admin: Any) -> tuple[str, ...]:
        return ()

    async def no_reason() -> str:
        return ""

    consumer = PromptConsumer(
        section=KafkaSection(), topics=Topics("t."), partitions=Partitions(), budget=IntakeBudget(high=10, low=1),
        metrics=Metrics().kafka, make_consumer=lambda: group, make_admin=lambda: group, prepare=no_topics,
        explain=no_reason, reading=ChunkReading(lambda: group, "t.chunks"),
        result_keys=ResultKeys(group, "t.results"), wall_ns=lambda: 0, engine_alive=lambda: True,
        on_state=lambda served, reason: None, on_deleted=lambda topic: None,
    )  # fmt: skip
    consumer._consumer = group
    consumer._commits = Committer(FakeOutput(), consumer, interval_s=0.001)
    return consumer


async def test_a_commit_under_way_ends_when_partitions_are_revoked() -> None:
    group: Any = HungGroup()
    consumer = consumer_of(group)
    committing = asyncio.create_task(consumer.commit({TopicPartition("t.prompts", 0): (5, "")}))
    await until(lambda: group.trying == 1)
    await consumer.on_partitions_revoked({TopicPartition("t.prompts", 0)})
    with pytest.raises(CommitFailedError):
        await committing
    assert group.trying == 0
