"""The dead-letter topic read back: which letters there are, what the original record was, and the record that replays it.

Guarantee: a replay is the original record again: value, key, headers (label, idempotency key, trace context), on the partition that it
stood on, with `sluice-replay-of` beside them; never a guess: a letter that does not hold the whole value is replayed only from the
original topic, and only if its digest is the letter's.
"""

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as ClientPartition
from aiokafka.structs import ConsumerRecord
from google.protobuf import json_format

from schemas.v1 import events_pb2
from service.kafka.records import HEADER_DEADLINE, HEADER_REPLAY_OF, HEADER_TTL, OutRecord

_QUIET_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """One dead letter and where it stands. `message` None: the record is none of ours."""

    partition: int
    offset: int
    message: events_pb2.DeadLetter | None

    @property
    def request_id(self) -> str:
        return "" if self.message is None else self.message.request_id

    @property
    def is_whole(self) -> bool:
        """Whether it holds the original value, with nothing left out."""
        message = self.message
        return message is not None and len(message.original_value) == message.original_value_bytes


class ReplayError(Exception):
    """This letter cannot be replayed; the message says why."""


async def letters(consumer: AIOKafkaConsumer, topic: str, num_partitions: int) -> AsyncIterator[Letter]:
    """Every letter that the topic holds now, partition by partition. `consumer` is started, without a group, read_committed.

    Raises `TimeoutError` when the broker gives nothing more before the end that it told.
    """
    for number in range(num_partitions):
        partition = ClientPartition(topic, number)
        consumer.assign([partition])
        end = (await consumer.end_offsets([partition]))[partition]
        await consumer.seek_to_beginning(partition)
        while await consumer.position(partition) < end:
            found = await consumer.getmany(partition, timeout_ms=int(_QUIET_S * 1_000))
            if not found and await consumer.position(partition) < end:
                raise TimeoutError(f"{topic}-{number} gave nothing for {_QUIET_S:g} s")
            for record in found.get(partition, ()):
                if record.offset < end:
                    yield Letter(partition=number, offset=record.offset, message=_message(record))


def _message(record: ConsumerRecord) -> events_pb2.DeadLetter | None:
    try:
        message: events_pb2.DeadLetter = json_format.Parse(record.value or b"", events_pb2.DeadLetter())
    except (json_format.ParseError, UnicodeDecodeError):
        return None
    return message if message.HasField("source") and message.request_id else None


async def replay_record(
    letter: Letter, read_original: Callable[[str, int, int], Awaitable[bytes | None]], *, keep_deadline: bool
) -> OutRecord:
    """The record that replays `letter`. Raises `ReplayError`.

    `read_original` gives the value at (topic, partition, offset), None when it is gone. Without `keep_deadline` the headers that
    limit its time are left out: of a prompt that stood among the dead letters for a day, an absolute deadline has passed.
    """
    message = letter.message
    if message is None:
        raise ReplayError("it is no dead letter of Sluice's")
    source, value = message.source, message.original_value
    if not letter.is_whole:
        found = await read_original(source.topic, source.partition, source.offset)
        if found is None or hashlib.sha256(found).digest() != message.original_value_sha256:
            raise ReplayError(
                f"its value of {message.original_value_bytes} bytes was too large to keep, and {message.request_id} is gone"
            )
        value = found
    dropped = {HEADER_REPLAY_OF} if keep_deadline else {HEADER_REPLAY_OF, HEADER_DEADLINE, HEADER_TTL}
    headers = [(name, content) for name, content in sorted(message.original_headers.items()) if name.lower() not in dropped]
    return OutRecord(
        topic=source.topic,
        partition=source.partition,
        key=message.original_key or None,
        value=value,
        headers=(*headers, (HEADER_REPLAY_OF, message.request_id.encode())),
    )
