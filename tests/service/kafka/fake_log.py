"""A Kafka log in memory, as the request log reads it, and the tail over it: no client, no waiting."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from schemas.v1 import inference_pb2
from service import wire
from service.contract import Source
from service.kafka.chunk_records import ChunkMessage, chunk_record
from service.kafka.records import InRecord, TopicPartition
from service.kafka.tail import Lapsed
from service.kafka.topics import Topics
from service.kafka.tracker import Progress
from tests.service.kafka.fakes import FakeRecord

TOPICS = Topics("t.")
NOW_MS = 1_700_000_100_000


@dataclass
class FakeLog:
    """Stands for `LogReader`: partition 0 of every topic. `reads` counts the records that were looked at."""

    records: dict[str, list[FakeRecord]] = field(default_factory=dict)
    begins: dict[str, int] = field(default_factory=dict)
    low: int = 0
    done: int = 0
    chunk_low: int = -1
    reads: int = 0

    def write(self, topic: str, value: bytes | None, *, key: bytes | None = None, headers=(), time_ms: int = NOW_MS) -> int:  # type: ignore[no-untyped-def]
        log = self.records.setdefault(topic, [])
        offset = self.begins.get(topic, 0) + len(log)
        log.append(FakeRecord(value, offset=offset, topic=topic, key=key, headers=headers, timestamp=time_ms))
        return offset

    def prompt(self, *, time_ms: int = NOW_MS) -> Source:
        return Source(topic=TOPICS.prompts, partition=0, offset=self.write(TOPICS.prompts, b"{}", time_ms=time_ms))

    def say(self, source: Source, message: ChunkMessage) -> None:
        record = chunk_record(TOPICS.chunks, source, message, wire.JSON)
        self.write(TOPICS.chunks, record.value, key=record.key, headers=record.headers)

    def result(self, source: Source, *, time_ms: int = NOW_MS, **fields) -> inference_pb2.Result:  # type: ignore[no-untyped-def]
        result = inference_pb2.Result(request_id=source.request_id, **fields)
        self.write(TOPICS.results, wire.to_bytes(result), key=source.request_id.encode(), time_ms=time_ms)
        return result

    async def num_partitions(self, topic: str) -> int:
        return 1 if topic in self.records else 0

    async def progress(self, partition: TopicPartition) -> tuple[int, Progress]:
        return self.low, Progress(epoch=1, done=self.done, chunk_low=self.chunk_low)

    async def bounds(self, partition: TopicPartition) -> tuple[int, int]:
        begin = self.begins.get(partition.topic, 0)
        return begin, begin + len(self.records.get(partition.topic, ()))

    async def offset_at(self, partition: TopicPartition, time_ms: int) -> int:
        _, end = await self.bounds(partition)
        return next((record.offset for record in self.records.get(partition.topic, ()) if record.timestamp >= time_ms), end)

    async def find(
        self,
        partition: TopicPartition,
        start: int,
        end: int,
        wanted: Callable[[InRecord], bool],
        *,
        enough: Callable[[InRecord], bool] = lambda record: False,
    ) -> list[InRecord]:
        found = []
        for record in self.records.get(partition.topic, ()):
            if start <= record.offset < end:
                self.reads += 1
                if wanted(record):
                    found.append(record)
                if enough(record):
                    break
        return found


class FakeWatch:
    """What came since the watch began; `Tail.feed` fills it."""

    def __init__(self, starts: dict[str, int]) -> None:
        self.starts = starts
        self.waiting: list[InRecord | Lapsed] = []
        self.arrived = asyncio.Event()

    def wake(self) -> None:
        self.arrived.set()

    async def take(self, timeout_s: float) -> list[InRecord]:
        try:
            await asyncio.wait_for(self.arrived.wait(), timeout_s)
        except TimeoutError:
            return []
        self.arrived.clear()
        taken, self.waiting = self.waiting, []
        for item in taken:
            if isinstance(item, Lapsed):
                raise item
        return [item for item in taken if not isinstance(item, Lapsed)]


class FakeTail:
    """Stands for `Tail` over a `FakeLog`: a watch begins at its end. `feed` gives what was written since; `lapse` ends the watch."""

    def __init__(self, log: FakeLog) -> None:
        self._log = log
        self.watches: list[FakeWatch] = []
        self.opened = asyncio.Event()

    @asynccontextmanager
    async def watch(self, partition: int, key: bytes) -> AsyncIterator[FakeWatch]:
        watch = FakeWatch({topic: len(self._log.records.get(topic, ())) for topic in (TOPICS.chunks, TOPICS.results)})
        self.watches.append(watch)
        self.opened.set()
        try:
            yield watch
        finally:
            self.watches.remove(watch)

    def feed(self) -> None:
        for watch in self.watches:
            for topic, start in watch.starts.items():
                watch.waiting += self._log.records.get(topic, ())[start:]
                watch.starts = {**watch.starts, topic: len(self._log.records.get(topic, ()))}
            watch.arrived.set()

    def lapse(self, *, broken: bool) -> None:
        for watch in self.watches:
            watch.waiting.append(Lapsed(broken=broken))
            watch.arrived.set()
