"""Looks into single partitions without a group: where they begin and end, what stands at an offset or after a time, what was committed.

Guarantees: at most `max_readers` clients, kept for the next look and closed with `close`; a look takes `LOOK_TIMEOUT_S` at most and
keeps only the records that are asked for. Whatever Kafka does not answer is a `RequestError` (`broker_unavailable`).
Reads committed records only; on the chunk topic, which is never written in a transaction, that is every record.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as ClientPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import IllegalStateError, KafkaError

from service.errors import CODES, RequestError
from service.kafka.records import InRecord, TopicPartition
from service.kafka.tracker import Progress, decode
from service.kafka.unreadable import UNREADABLE

_log = structlog.get_logger(__name__)

LOOK_TIMEOUT_S = 30.0
_COORDINATOR_S = 10.0
_RETRY_S = 0.2
_STOP_S = 2.0
_POLL_MS = 200
FAILURES = (KafkaError, IllegalStateError, OSError, TimeoutError, *UNREADABLE)
"""What the client raises when the broker, or what it holds, cannot be read now."""


def unavailable() -> RequestError:
    """What a caller is told then."""
    return RequestError("broker_unavailable", CODES["broker_unavailable"].meaning, retry_after_s=1.0)


class LogReader:
    """`make_consumer` and `make_admin` give fresh, not yet started clients; the consumers are without a group."""

    def __init__(
        self,
        *,
        make_consumer: Callable[[], AIOKafkaConsumer],
        make_admin: Callable[[], AIOKafkaAdminClient],
        group_id: str,
        knows_times: bool = True,
        max_readers: int = 4,
    ) -> None:
        """`knows_times` False: the broker cannot look offsets up by time, so that every look begins at the beginning."""
        self._make_consumer, self._make_admin = make_consumer, make_admin
        self._group_id = group_id
        self._knows_times = knows_times
        self._idle: list[AIOKafkaConsumer] = []
        self._places = asyncio.Semaphore(max_readers)
        self._admin: AIOKafkaAdminClient | None = None
        self._admin_lock = asyncio.Lock()
        self._closed = False

    async def num_partitions(self, topic: str) -> int:
        """0 where there is no such topic."""
        async with self._asking() as admin:
            if topic not in await admin.list_topics():
                return 0
            (found,) = await admin.describe_topics([topic])
        return len(found["partitions"])

    async def progress(self, partition: TopicPartition) -> tuple[int, Progress]:
        """What the group has committed: (low, its metadata); low is -1 when nothing was."""
        asked = ClientPartition(*partition)
        async with self._asking() as admin, asyncio.timeout(_COORDINATOR_S):
            while True:
                try:
                    # The consumer's own `committed()` drops the metadata.
                    found = await admin.list_consumer_group_offsets(self._group_id, partitions=[asked])
                except KafkaError as error:
                    if not error.retriable:
                        raise
                    found = {}
                if asked in found:
                    return found[asked].offset, decode(found[asked].metadata)
                # The coordinator moves, or loads: the client may drop the answer's own error.
                await asyncio.sleep(_RETRY_S)

    async def bounds(self, partition: TopicPartition) -> tuple[int, int]:
        """The first offset there is, and the one after the last record that may be read."""
        asked = ClientPartition(*partition)
        async with self._reading() as consumer:
            begin = await consumer.beginning_offsets([asked])
            end = await consumer.end_offsets([asked])
        return begin[asked], end[asked]

    async def offset_at(self, partition: TopicPartition, time_ms: int) -> int:
        """The offset of the first record at or after a time (milliseconds since the epoch); the end when there is none."""
        asked = ClientPartition(*partition)
        async with self._reading() as consumer:
            if not self._knows_times:
                return int((await consumer.beginning_offsets([asked]))[asked])
            found = (await consumer.offsets_for_times({asked: max(0, time_ms)}))[asked]
            return int(found.offset if found is not None else (await consumer.end_offsets([asked]))[asked])

    async def find(
        self,
        partition: TopicPartition,
        start: int,
        end: int,
        wanted: Callable[[InRecord], bool],
        *,
        enough: Callable[[InRecord], bool] = lambda record: False,
    ) -> list[InRecord]:
        """The wanted records in [start, end), `end` not above the partition's own; up to the first for which `enough` holds."""
        found: list[InRecord] = []
        if start >= end:
            return found
        asked = ClientPartition(*partition)
        async with self._reading() as consumer:
            consumer.assign([asked])
            consumer.seek(asked, start)
            while True:
                for record in (await consumer.getmany(asked, timeout_ms=_POLL_MS)).get(asked, ()):
                    if record.offset >= end:
                        return found
                    if wanted(record):
                        found.append(record)
                    if enough(record):
                        return found
                # Markers of transactions and compacted records are passed without a record to give.
                if await consumer.position(asked) >= end:
                    return found

    async def close(self) -> None:
        """Ends the idle clients; one in use ends with its use."""
        self._closed = True
        while self._idle:
            await _stop(self._idle.pop().stop)
        await self._drop_admin()

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[AIOKafkaConsumer]:
        async with self._places:
            whole, consumer = False, self._idle.pop() if self._idle else None
            try:
                async with asyncio.timeout(LOOK_TIMEOUT_S):
                    if consumer is None:
                        consumer = self._make_consumer()
                        await consumer.start()
                    yield consumer
                whole = not self._closed
            except FAILURES as error:
                _log.info("a look into Kafka failed", error=type(error).__name__)
                raise unavailable() from error
            finally:
                if consumer is not None and whole:
                    consumer.assign([])
                    self._idle.append(consumer)
                elif consumer is not None:
                    await _stop(consumer.stop)

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[AIOKafkaAdminClient]:
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                async with self._admin_lock:
                    if self._admin is None:
                        admin = self._make_admin()
                        try:
                            await admin.start()
                        except BaseException:
                            await _stop(admin.close)
                            raise
                        self._admin = admin
                yield self._admin
        except FAILURES as error:
            _log.info("a question to Kafka failed", error=type(error).__name__)
            await self._drop_admin()
            raise unavailable() from error

    async def _drop_admin(self) -> None:
        admin, self._admin = self._admin, None
        if admin is not None:
            await _stop(admin.close)


async def _stop(stop: Callable[[], Any]) -> None:
    try:
        async with asyncio.timeout(_STOP_S):
            await stop()
    except FAILURES as error:
        _log.info("a Kafka client did not stop in order", error=type(error).__name__)
