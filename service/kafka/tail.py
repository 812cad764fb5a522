"""Follows the chunks and results of the partitions that somebody watches, with one client, and hands each record to its request's watches.

Guarantees: a watch gets every record of its request from `starts` on, in each topic's order, or is told that it lapsed: when more than
`MAX_WAITING_BYTES` wait for its reader, or Kafka cannot be read. It begins again from where it was then. Nobody waits for a reader.
The client lives while there are watches, and `LINGER_S` longer.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog
from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as ClientPartition

from service.kafka.log_reader import FAILURES
from service.kafka.records import InRecord
from service.kafka.topics import Topics

_log = structlog.get_logger(__name__)

MAX_WAITING_BYTES = 1_048_576
LINGER_S = 10.0
_START_TIMEOUT_S = 10.0
_POLL_MS = 1_000


class Lapsed(Exception):
    """The watch has lost records: begin again from the last one taken. `broken`: Kafka could not be read."""

    def __init__(self, *, broken: bool) -> None:
        super().__init__("the watch has lapsed")
        self.broken = broken


class Watch:
    """One reader of one request's records; made by `Tail.watch`."""

    def __init__(self, partition: int, key: bytes) -> None:
        self.partition, self.key = partition, key
        self.starts: dict[str, int] = {}
        """Topic -> offset: every record of the request from there on comes."""
        self._records: list[InRecord] = []
        self._num_bytes = 0
        self._lapsed: Lapsed | None = None
        self._arrived = asyncio.Event()

    async def take(self, timeout_s: float) -> list[InRecord]:
        """What has come; nothing after `timeout_s` of silence, or once `wake` was called. Raises `Lapsed`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._arrived.wait()
        if self._lapsed is not None:
            raise self._lapsed
        self._arrived.clear()
        records, self._records, self._num_bytes = self._records, [], 0
        return records

    async def opened(self) -> None:
        """Returns once `starts` is known. Raises `Lapsed`."""
        await self._arrived.wait()
        if self._lapsed is not None:
            raise self._lapsed
        self._arrived.clear()

    def wake(self) -> None:
        """Ends a `take` that waits."""
        self._arrived.set()

    def begin(self, starts: dict[str, int]) -> None:
        """From here on records come."""
        self.starts = starts
        self._arrived.set()

    def put(self, record: InRecord) -> None:
        """A record of the request."""
        self._num_bytes += len(record.value or b"")
        if self._num_bytes > MAX_WAITING_BYTES:
            self.lapse(broken=False)
        else:
            self._records.append(record)
            self._arrived.set()

    def lapse(self, *, broken: bool) -> None:
        """Nothing more comes."""
        if self._lapsed is None:
            self._lapsed, self._records = Lapsed(broken=broken), []
            self._arrived.set()


class Tail:
    """`make_consumer` gives a fresh, not yet started client without a group."""

    def __init__(self, make_consumer: Callable[[], AIOKafkaConsumer], topics: Topics) -> None:
        self._make_consumer = make_consumer
        self._topics = (topics.chunks, topics.results)
        self._watches: dict[bytes, list[Watch]] = {}
        self._changed = asyncio.Event()
        self._positions: dict[ClientPartition, int] = {}
        self._running: asyncio.Task[None] | None = None

    @property
    def num_watches(self) -> int:
        return sum(map(len, self._watches.values()))

    @asynccontextmanager
    async def watch(self, partition: int, key: bytes) -> AsyncIterator[Watch]:
        """A watch for the block, opened: records come from `starts` on. Raises `Lapsed`."""
        watch = Watch(partition, key)
        self._watches.setdefault(key, []).append(watch)
        try:
            starts = {topic: self._positions.get(ClientPartition(topic, partition)) for topic in self._topics}
            known = {topic: offset for topic, offset in starts.items() if offset is not None}
            if len(known) == len(starts):
                watch.begin(known)
            self._changed.set()
            if self._running is None or self._running.done():
                self._running = asyncio.create_task(self._run(), name="kafka tail")
            await watch.opened()
            yield watch
        finally:
            self._watches[key].remove(watch)
            if not self._watches[key]:
                del self._watches[key]
            self._changed.set()

    async def close(self) -> None:
        """Ends the client; open watches lapse. Idempotent."""
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            await asyncio.wait({running})

    async def _run(self) -> None:
        consumer = self._make_consumer()
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await consumer.start()
            while await self._follow(consumer):
                pass
        except FAILURES as error:
            _log.info("chunks and results cannot be followed", error=type(error).__name__)
        finally:
            # Whoever comes from now on begins with another client.
            self._running = None
            self._positions = {}
            for watch in [watch for watches in self._watches.values() for watch in watches]:
                watch.lapse(broken=True)
            with contextlib.suppress(*FAILURES):
                await consumer.stop()

    async def _follow(self, consumer: AIOKafkaConsumer) -> bool:
        """One round: the wanted partitions, and what they have. False once nobody has watched for a while."""
        self._changed.clear()
        wanted = {watch.partition for watches in self._watches.values() for watch in watches}
        if not wanted:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    await self._changed.wait()
                return True
            return False
        await self._assign(consumer, wanted)
        polling = asyncio.ensure_future(consumer.getmany(timeout_ms=_POLL_MS))
        waiting = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait({polling, waiting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Records leave the client in the step that ends the poll: a cancelled one has taken none.
            polling.cancel()
            waiting.cancel()
            await asyncio.wait({polling, waiting})
        if not polling.cancelled():
            for partition, records in polling.result().items():
                self._positions[partition] = records[-1].offset + 1
                for record in records:
                    for watch in self._watches.get(record.key or b"", ()):
                        watch.put(record)
        return True

    async def _assign(self, consumer: AIOKafkaConsumer, wanted: set[int]) -> None:
        asked = {ClientPartition(topic, partition) for topic in self._topics for partition in wanted}
        if asked != self._positions.keys():
            new = asked - self._positions.keys()
            async with asyncio.timeout(_START_TIMEOUT_S):
                ends = await consumer.end_offsets(list(new)) if new else {}
            self._positions = {partition: self._positions.get(partition, ends.get(partition, 0)) for partition in asked}
            consumer.assign(list(asked))
            for partition, offset in self._positions.items():
                consumer.seek(partition, offset)
        for watch in [watch for watches in self._watches.values() for watch in watches]:
            if not watch.starts and watch.partition in wanted:
                watch.begin({topic: self._positions[ClientPartition(topic, watch.partition)] for topic in self._topics})
