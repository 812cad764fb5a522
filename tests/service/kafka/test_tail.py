"""Watches on a client that follows chunks and results: what they get, and how they are told that they did not."""

import asyncio
from collections.abc import Sequence

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError

from service.kafka import tail as tails
from service.kafka.tail import Lapsed, Tail, Watch
from service.kafka.topics import Topics
from tests.service.kafka.fakes import FakeRecord

TOPICS = Topics("t.")
WAIT_S = 20.0


class FakeConsumer:
    """A client whose partitions end at `end`; `put` gives it records, or an error, to hand out."""

    def __init__(self) -> None:
        self.end = 5
        self.assigned: list[TopicPartition] = []
        self.positions: dict[TopicPartition, int] = {}
        self.stopped = False
        self._found: asyncio.Queue[dict[TopicPartition, list[FakeRecord]] | Exception] = asyncio.Queue()

    async def start(self) -> None: ...

    async def stop(self) -> None:
        self.stopped = True

    async def end_offsets(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, self.end)

    def assign(self, partitions: Sequence[TopicPartition]) -> None:
        self.assigned = sorted(partitions)
        self.positions = {}

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self.positions[partition] = offset

    async def getmany(self, *, timeout_ms: int) -> dict[TopicPartition, list[FakeRecord]]:
        found = await self._found.get()
        if isinstance(found, Exception):
            raise found
        return found

    def put(self, *records: FakeRecord) -> None:
        found: dict[TopicPartition, list[FakeRecord]] = {}
        for record in records:
            found.setdefault(TopicPartition(record.topic, record.partition), []).append(record)
        self._found.put_nowait(found)

    def fail(self) -> None:
        self._found.put_nowait(KafkaConnectionError("gone"))


def record(key: bytes, offset: int, *, topic: str = TOPICS.chunks, partition: int = 0, size: int = 1) -> FakeRecord:
    return FakeRecord(b"x" * size, offset=offset, topic=topic, partition=partition, key=key)


@pytest.fixture
def consumers() -> list[FakeConsumer]:
    return []


@pytest.fixture
async def tail(consumers: list[FakeConsumer]):  # type: ignore[no-untyped-def]
    def make() -> FakeConsumer:
        consumers.append(FakeConsumer())
        return consumers[-1]

    tail = Tail(make, TOPICS)  # type: ignore[arg-type]
    yield tail
    await tail.close()
    assert all(consumer.stopped for consumer in consumers)


async def offsets(watch: Watch) -> list[int]:
    return [record.offset for record in await asyncio.wait_for(watch.take(WAIT_S), WAIT_S)]


async def test_each_watch_gets_its_requests_records_from_where_it_began(tail: Tail, consumers: list[FakeConsumer]) -> None:
    async with tail.watch(0, b"a") as one, tail.watch(0, b"b") as other, tail.watch(0, b"a") as same:
        (consumer,) = consumers
        assert one.starts == other.starts == {TOPICS.chunks: 5, TOPICS.results: 5}
        consumer.put(record(b"a", 5), record(b"b", 6), record(b"c", 7), record(b"a", 8))
        assert (await offsets(one), await offsets(other), await offsets(same)) == ([5, 8], [6], [5, 8])


async def test_a_watch_of_another_partition_moves_no_position(tail: Tail, consumers: list[FakeConsumer]) -> None:
    async with tail.watch(0, b"a") as first:
        (consumer,) = consumers
        consumer.put(record(b"a", 5))
        assert await offsets(first) == [5]
        consumer.end = 40
        async with tail.watch(1, b"b") as second:
            assert second.starts == {TOPICS.chunks: 40, TOPICS.results: 40}
            assert consumer.positions == {
                TopicPartition(TOPICS.chunks, 0): 6,
                TopicPartition(TOPICS.results, 0): 5,
                TopicPartition(TOPICS.chunks, 1): 40,
                TopicPartition(TOPICS.results, 1): 40,
            }


async def test_a_reader_that_is_too_slow_lapses_alone(
    tail: Tail, consumers: list[FakeConsumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tails, "MAX_WAITING_BYTES", 100)
    async with tail.watch(0, b"a") as slow, tail.watch(0, b"b") as quick:
        consumers[0].put(record(b"a", 5, size=90), record(b"a", 6, size=90), record(b"b", 7))
        assert await offsets(quick) == [7]
        with pytest.raises(Lapsed) as caught:
            await slow.take(WAIT_S)
    assert not caught.value.broken


async def test_when_kafka_cannot_be_read_every_watch_is_told_and_the_next_one_begins_anew(
    tail: Tail, consumers: list[FakeConsumer]
) -> None:
    async with tail.watch(0, b"a") as watch:
        consumers[0].fail()
        with pytest.raises(Lapsed) as caught:
            await asyncio.wait_for(watch.take(WAIT_S), WAIT_S)
        assert caught.value.broken
    async with tail.watch(0, b"a") as watch:
        consumers[1].put(record(b"a", 5))
        assert await offsets(watch) == [5]


async def test_a_silence_is_told_from_the_end(tail: Tail) -> None:
    async with tail.watch(0, b"a") as watch:
        assert await watch.take(0.001) == []


async def test_the_client_ends_when_nobody_has_watched_for_a_while(
    tail: Tail, consumers: list[FakeConsumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tails, "LINGER_S", 0.001)
    async with tail.watch(0, b"a"):
        running = tail._running
    assert running is not None
    await asyncio.wait_for(running, WAIT_S)
    assert (consumers[0].stopped, tail.num_watches) == (True, 0)
