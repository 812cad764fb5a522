"""What an assignment does with what the group's coordinator says, and with what it does not say."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from aiokafka import TopicPartition as ClientPartition
from aiokafka.structs import OffsetAndMetadata

from service.kafka.assignment import Assignment
from service.kafka.committer import Committer
from service.kafka.ownership import Partitions
from service.kafka.records import TopicPartition
from service.kafka.tracker import Progress, decode, encode
from tests.service.kafka.fakes import FakeOutput, until

PARTITION = TopicPartition("t", 0)


class FakeGroup:
    """Consumer and admin client in one: a log of 100 records, and what the coordinator answers, one answer a question."""

    def __init__(self, *answers: Mapping[ClientPartition, OffsetAndMetadata]) -> None:
        self.answers = list(answers)
        self.commits: list[tuple[int, str]] = []
        self.position = -1

    async def list_consumer_group_offsets(
        self, group_id: str, partitions: Sequence[ClientPartition]
    ) -> Mapping[ClientPartition, OffsetAndMetadata]:
        return self.answers.pop(0)

    async def beginning_offsets(self, partitions: Sequence[ClientPartition]) -> dict[ClientPartition, int]:
        return dict.fromkeys(partitions, 0)

    async def end_offsets(self, partitions: Sequence[ClientPartition]) -> dict[ClientPartition, int]:
        return dict.fromkeys(partitions, 100)

    async def commit(self, points: Any) -> None:
        self.commits += points.values()

    def seek(self, partition: ClientPartition, offset: int) -> None:
        self.position = offset

    def resume(self, partition: ClientPartition) -> None:
        pass


async def opened(group: FakeGroup) -> Partitions:
    partitions = Partitions()
    committer = Committer(FakeOutput(), group, interval_s=0.001)
    consumer: Any = group
    assignment = Assignment(
        consumer=consumer, admin=consumer, partitions=partitions, committer=committer, group_id="g", window=64
    )
    task = asyncio.create_task(assignment.open([PARTITION]))
    await until(lambda: len(partitions) == 1)
    await task
    return partitions


async def test_an_answer_without_the_partition_is_no_word_that_it_was_never_committed() -> None:
    said = OffsetAndMetadata(40, encode(Progress(epoch=3, next_offset=50, done=0b10)))
    group = FakeGroup({}, {ClientPartition(*PARTITION): said})
    (owned,) = await opened(group)
    assert (owned.tracker.low, owned.epoch, group.position) == (40, 4, 40)
    assert [(low, decode(metadata).epoch) for low, metadata in group.commits] == [(40, 4)]


async def test_a_partition_without_a_commit_begins_at_its_logs_beginning() -> None:
    group = FakeGroup({ClientPartition(*PARTITION): OffsetAndMetadata(-1, "")})
    (owned,) = await opened(group)
    assert (owned.tracker.low, owned.epoch) == (0, 1)
