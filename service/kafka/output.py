"""The one producer of this process: idempotent, every record acknowledged by all in-sync replicas.

Guarantees: records of one partition arrive in the order of `send` calls that followed one another; a transport error is retried
by the client for ever without duplicates, so an unanswered future means "not yet". After an error that is final for a batch the
client's sequence numbers no longer fit the broker's: the producer is replaced before the next record.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError, UnknownTopicOrPartitionError

from service.errors import RequestError
from service.kafka.records import OutRecord

_log = structlog.get_logger(__name__)

REQUEST_OVERHEAD_BYTES = 65_536
"""Room above the largest record for its key, headers and framing."""


class Output(Protocol):
    """Where records go."""

    async def send(self, record: OutRecord) -> "asyncio.Future[int]":
        """Hands a record over in order; the answer resolves once it is durable, to its offset.

        Raises `RequestError` (`result_too_large`) for a record that can never be written, `KafkaError` for what may pass; so does
        the answer.
        """
        ...


class ProducerOutput:
    """`Output` on aiokafka; `make` gives a fresh, not yet started producer."""

    def __init__(self, make: Callable[[], AIOKafkaProducer]) -> None:
        self._make = make
        self._producer: AIOKafkaProducer | None = None
        self._broken = False
        self._lock = asyncio.Lock()

    async def send(self, record: OutRecord) -> "asyncio.Future[int]":
        producer = await self._current()
        await self._require_partition(producer, record)
        try:
            future = await producer.send(
                record.topic, record.value, key=record.key, partition=record.partition, headers=list(record.headers)
            )
        except MessageSizeTooLargeError as error:
            raise _too_large(record) from error
        except KafkaError as error:
            if not isinstance(error, KafkaTimeoutError) and not error.retriable:
                # Its sender has ended: nothing would ever leave this producer again.
                self._fail(producer)
            raise
        # One of its own: whoever waits may be cancelled; the record is on its way all the same.
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: self._acknowledged(record, producer, done, answer))
        return answer

    async def close(self, timeout_s: float = 5.0) -> None:
        """Sends what is left for at most `timeout_s`; what is not acknowledged by then is given up. Idempotent."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await _stop(producer, timeout_s)

    async def _current(self) -> AIOKafkaProducer:
        if self._producer is not None and not self._broken:
            return self._producer
        async with self._lock:
            if self._broken and self._producer is not None:
                old, self._producer = self._producer, None
                await _stop(old, 1.0)
            if self._producer is None:
                producer = self._make()
                try:
                    await producer.start()
                except BaseException:
                    await _stop(producer, 1.0)
                    raise
                self._producer, self._broken = producer, False
            return self._producer

    async def _require_partition(self, producer: AIOKafkaProducer, record: OutRecord) -> None:
        """Raises `KafkaError` while the topic has no such partition: the prompts' topic may grow before the others do."""
        if record.partition is not None and record.partition not in await producer.partitions_for(record.topic):
            producer.client.force_metadata_update()
            raise UnknownTopicOrPartitionError(f"{record.topic} has no partition {record.partition}")

    def _acknowledged(
        self, record: OutRecord, producer: AIOKafkaProducer, done: "asyncio.Future[Any]", answer: "asyncio.Future[int]"
    ) -> None:
        error = None if done.cancelled() else done.exception()
        if isinstance(error, KafkaError):
            self._fail(producer)
        if answer.done():
            return
        if done.cancelled():
            answer.cancel()
        elif error is None:
            answer.set_result(done.result().offset)
        else:
            answer.set_exception(_too_large(record) if isinstance(error, MessageSizeTooLargeError) else error)

    def _fail(self, producer: AIOKafkaProducer) -> None:
        if producer is self._producer and not self._broken:
            self._broken = True
            _log.warning("the producer is replaced after an error that it cannot get over")


def _too_large(record: OutRecord) -> RequestError:
    return RequestError("result_too_large", f"a record of {record.num_bytes} bytes is larger than {record.topic} takes")


async def _stop(producer: AIOKafkaProducer, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await producer.stop()
    except (KafkaError, TimeoutError) as error:
        _log.warning("the producer did not stop in order", error=type(error).__name__)
