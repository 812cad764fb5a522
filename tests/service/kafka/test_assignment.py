"""What an assignment does with what the group's coordinator says, and with what it does not say."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from aiokafka import TopicPartition as ClientPartition
from aiokafka.errors import KafkaConnectionError
from aiokafka.structs import OffsetAndMetadata

from service.kafka.assignment import Assignment
from service.kafka.chunk_records import Said
from service.kafka.idempotency import IdempotencyWindow
from service.kafka.ownership import OwnedPartition, Partitions
from service.kafka.records import TopicPartition
from service.kafka.tracker import Progress, decode, encode

PARTITION = TopicPartition("t", 0)


class FakeGroup:
    """Consumer and coordinator in one: a log of 100 records, what was committed, and what happened in which order."""

    def __init__(self, *committed: OffsetAndMetadata) -> None:
        self.committed = list(committed)
        self.commits: list[tuple[int, str]] = []
        self.position = -1
        self.said: dict[int, Said] = {}
        self.events: list[str] = []
        self.identity = "a1"

    async def topic_id(self, topic: str) -> str:
        return self.identity

    async def progress(self, partition: TopicPartition) -> OffsetAndMetadata:
        self.events.append("progress")
        return self.committed.pop(0)

    async def beginning_offsets(self, partitions: Sequence[ClientPartition]) -> dict[ClientPartition, int]:
        return dict.fromkeys(partitions, 0)

    async def end_offsets(self, partitions: Sequence[ClientPartition]) -> dict[ClientPartition, int]:
        return dict.fromkeys(partitions, 100)

    async def claim(self, partition: TopicPartition, point: tuple[int, str]) -> None:
        self.events.append("claim")
        self.commits.append(point)

    def seek(self, partition: ClientPartition, offset: int) -> None:
        self.events.append("seek")
        self.position = offset

    def resume(self, partition: ClientPartition) -> None:
        self.events.append("resume")

    async def fence(self, partition: TopicPartition) -> None:
        self.events.append("fence")

    def opened(self, owned: OwnedPartition) -> None:
        self.events.append("opened")

    def partition(self, of: TopicPartition) -> ClientPartition:
        return ClientPartition("chunks", of.partition)

    async def end(self, partition: TopicPartition) -> int:
        return 100

    async def restore(self, window: IdempotencyWindow, of: TopicPartition, *, begin: int, end: int) -> None:
        self.events.append(f"read keys {begin}-{end}")

    async def unfinished(
        self, of: TopicPartition, is_done: Callable[[int], bool], *, begin: int, end: int
    ) -> tuple[dict[int, Said], int]:
        self.events.append(f"read chunks {begin}-{end}")
        return self.said, end


async def opened(group: FakeGroup, partitions: Partitions | None = None) -> Partitions:
    partitions = partitions or Partitions()
    anything: Any = group
    assignment = Assignment(
        consumer=anything, progress=group.progress, partitions=partitions, commits=anything, reading=anything,
        result_keys=anything, window=64, wall_ns=lambda: 0, topic_id=group.topic_id,
        retire=lambda owned: partitions.retire(owned.partition),
    )  # fmt: skip
    await assignment.open(PARTITION)
    return partitions


def point(low: int, *, topic_id: str = "", **progress: int) -> OffsetAndMetadata:
    return OffsetAndMetadata(low, encode(Progress(topic_id=topic_id, **progress)))


async def test_a_new_owner_fences_reads_commits_its_epoch_and_only_then_opens() -> None:
    group = FakeGroup(point(40, epoch=3, next_offset=50, done=0b10, chunk_low=7, result_low=60))
    (owned,) = await opened(group)
    read = ["read chunks 7-100", "read keys 60-100"]
    assert group.events == ["fence", "progress", *read, "claim", "seek", "resume", "opened"]
    assert (owned.tracker.low, owned.epoch, owned.tracker.commits, group.position) == (40, 4, 1, 40)
    assert [(low, decode(metadata).epoch) for low, metadata in group.commits] == [(40, 4)]


async def test_a_partition_without_a_commit_begins_at_its_logs_beginning() -> None:
    group = FakeGroup(OffsetAndMetadata(-1, ""))
    (owned,) = await opened(group)
    assert (owned.tracker.low, owned.epoch) == (0, 1)
    assert decode(group.commits[0][1]).chunk_low == 100


async def test_a_partition_whose_epoch_is_still_ours_is_kept_with_what_runs() -> None:
    group = FakeGroup(point(40, epoch=3), point(40, epoch=4))
    partitions = await opened(group)
    (owned,) = partitions
    owned.revoke()
    group.events.clear()
    await opened(group, partitions)
    assert (tuple(partitions), owned.state) == ((owned,), "open")
    assert group.events == ["progress", "seek", "resume", "opened"]


async def test_a_partition_that_another_had_meanwhile_is_lost_and_begins_anew() -> None:
    group = FakeGroup(point(40, epoch=3), point(45, epoch=5), point(46, epoch=5))
    partitions = await opened(group)
    (first,) = partitions
    first.revoke()
    await opened(group, partitions)
    (second,) = partitions
    assert (first.state, second.epoch, second.tracker.low) == ("lost", 6, 46)


async def test_chunks_of_unfinished_prompts_are_held_by_the_first_commit() -> None:
    group = FakeGroup(point(40, epoch=3, next_offset=50, chunk_low=7))
    group.said = {42: Said(first_offset=31), 44: Said(first_offset=20)}
    (owned,) = await opened(group)
    assert decode(group.commits[0][1]).chunk_low == 20
    assert owned.said == group.said


async def test_what_may_pass_is_tried_again() -> None:
    group = FakeGroup(point(1, epoch=1), point(1, epoch=1))
    failures = [KafkaConnectionError("away")]

    async def fence(partition: TopicPartition) -> None:
        if failures:
            raise failures.pop()

    group.fence = fence  # type: ignore[method-assign]
    (owned,) = await opened(group)
    assert owned.state == "open"


async def test_progress_is_committed_with_the_topics_identity() -> None:
    group = FakeGroup(point(40, epoch=3))
    await opened(group)
    assert decode(group.commits[0][1]).topic_id == "a1"


async def test_progress_of_another_topic_of_the_name_is_passed_over_but_for_its_epoch() -> None:
    group = FakeGroup(point(40, epoch=3, next_offset=50, done=0b10, chunk_low=7, result_low=60, topic_id="b2"))
    (owned,) = await opened(group)
    assert (owned.tracker.low, owned.epoch, owned.tracker.is_done(41), owned.redelivered_below) == (0, 4, False, 0)
    assert [event for event in group.events if event.startswith("read keys")] == []
    assert decode(group.commits[0][1]).topic_id == "a1"


async def test_a_topic_made_anew_under_an_owner_retires_what_it_held() -> None:
    group = FakeGroup(point(40, epoch=3), OffsetAndMetadata(-1, ""))
    partitions = await opened(group)
    (first,) = partitions
    group.identity = "b2"
    await opened(group, partitions)
    (second,) = partitions
    # The broker has forgotten the epoch; readers have not.
    assert (first.state, second.tracker.low, second.epoch) == ("retired", 0, first.epoch + 1)


@pytest.mark.parametrize(("committed_for", "low"), [("a1", 100), ("", 0), ("b2", 0)])
async def test_a_log_that_ends_before_its_progress_was_cut_or_is_another(committed_for: str, low: int) -> None:
    (owned,) = await opened(FakeGroup(point(140, epoch=3, done=0b10, topic_id=committed_for)))
    assert (owned.tracker.low, owned.tracker.is_done(low + 1)) == (low, False)
