"""Prompts and cancels that come over another transport, written to their topics: the acknowledged record is what makes them durable.

Guarantees: `write` returns once all in-sync replicas have the record, or raises within `WRITE_TIMEOUT_S`. A write that failed so may
still come about (the client keeps trying for a while): whoever repeats it should give an idempotency key.
"""

import asyncio
import hashlib
from collections.abc import Callable

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, UnknownTopicOrPartitionError

from service.contract import PromptRequest, Source
from service.errors import RequestError
from service.kafka.log_reader import unavailable
from service.kafka.records import OutRecord

_log = structlog.get_logger(__name__)

WRITE_TIMEOUT_S = 10.0
_STOP_S = 5.0
_HASHED_CHARACTERS = 1_024


def affinity_key(prompt: PromptRequest, key: str, conversation_id: str) -> str:
    """The record's key: what is given, else what keeps equal beginnings together, so that they meet a warm prefix cache."""
    if key or conversation_id or prompt.label:
        return key or conversation_id or prompt.label
    if prompt.messages is not None:
        start = "\0".join(f"{role}\0{content}" for role, content in prompt.messages)
    else:
        start = prompt.text or ",".join(map(str, (prompt.token_ids or ())[:_HASHED_CHARACTERS]))
    return hashlib.blake2b(start[:_HASHED_CHARACTERS].encode("utf-8", "replace"), digest_size=12).hexdigest()


class Submission:
    """`make_producer` gives a fresh, not yet started client."""

    def __init__(self, make_producer: Callable[[], AIOKafkaProducer]) -> None:
        self._make_producer = make_producer
        self._producer: AIOKafkaProducer | None = None
        self._lock = asyncio.Lock()

    async def write(self, record: OutRecord) -> Source:
        """Where the record stands. Raises `RequestError`."""
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                producer = await self._current()
                try:
                    if not await producer.partitions_for(record.topic):
                        raise UnknownTopicOrPartitionError(record.topic)
                    written = await producer.send_and_wait(
                        record.topic, record.value, key=record.key, partition=record.partition, headers=list(record.headers)
                    )
                except MessageSizeTooLargeError:
                    raise RequestError(
                        "prompt_too_long",
                        f"a record of {record.num_bytes} bytes is larger than {record.topic} takes",
                        field="prompt",
                    ) from None
        except (KafkaError, OSError, TimeoutError) as error:
            _log.info("a record was not written", topic=record.topic, error=type(error).__name__)
            # Whatever state it is in: the next write begins with another one.
            await self.close()
            raise unavailable() from error
        return Source(topic=written.topic, partition=written.partition, offset=written.offset)

    async def close(self) -> None:
        """Ends the producer; idempotent."""
        producer, self._producer = self._producer, None
        if producer is not None:
            try:
                async with asyncio.timeout(_STOP_S):
                    await producer.stop()
            except (KafkaError, TimeoutError) as error:
                _log.info("the producer of submissions did not stop in order", error=type(error).__name__)

    async def _current(self) -> AIOKafkaProducer:
        async with self._lock:
            if self._producer is None:
                producer = self._make_producer()
                try:
                    await producer.start()
                except BaseException:
                    await producer.stop()
                    raise
                self._producer = producer
            return self._producer
