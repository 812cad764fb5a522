"""Reads the control topic: cancels from any replica reach the one that runs the request, or will.

Guarantees: cancels are known from the time of the oldest prompt that was taken here on (and from the start of this replica on);
a broker that is away is tried again until it is back. Reading a cancel twice does no harm. Knows no generation: `Cancels` tells it.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from schemas.v1 import events_pb2
from service import wire
from service.kafka.cancels import Cancels
from service.kafka.log_reader import FAILURES
from service.kafka.records import HEADER_CONTENT_TYPE, HEADER_TYPE, InRecord, OutRecord

_log = structlog.get_logger(__name__)

CLOCK_SLACK_MS = 300_000
"""How far a producer's clock may be ahead of that of the replica which wrote the cancel."""
_RETRY_S = 2.0
_POLL_MS = 1_000
_TIMEOUT_S = 10.0


class ControlReader:
    """`run` is its task. `make_consumer` gives a fresh, not yet started client without a group."""

    def __init__(
        self,
        make_consumer: Callable[[], AIOKafkaConsumer],
        topic: str,
        cancels: Cancels,
        *,
        knows_times: bool = True,
    ) -> None:
        self._make_consumer = make_consumer
        self._topic = topic
        self._cancels = cancels
        self._knows_times = knows_times

    async def run(self) -> None:
        """Reads until cancelled."""
        while True:
            try:
                await self._session()
            except FAILURES as error:
                _log.info("the control topic cannot be read", error=type(error).__name__)
            await asyncio.sleep(_RETRY_S)

    async def _session(self) -> None:
        consumer = self._make_consumer()
        # Without a group that is every partition, those that are added later too.
        consumer.subscribe([self._topic])
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await consumer.start()
            self._cancels.earlier.set()
            while True:
                if self._cancels.earlier.is_set():
                    self._cancels.earlier.clear()
                    await self._go_back(consumer)
                await self._poll(consumer)
        finally:
            with contextlib.suppress(*FAILURES):
                await consumer.stop()

    async def _go_back(self, consumer: AIOKafkaConsumer) -> None:
        partitions = sorted(consumer.assignment())
        async with asyncio.timeout(_TIMEOUT_S):
            if not self._knows_times:
                starts = await consumer.beginning_offsets(partitions)
            else:
                since_ms = max(0, self._cancels.since_ms - CLOCK_SLACK_MS)
                found = await consumer.offsets_for_times(dict.fromkeys(partitions, since_ms))
                ends = await consumer.end_offsets(partitions)
                starts = {at: ends[at] if found[at] is None else found[at].offset for at in partitions}
        for partition, offset in starts.items():
            consumer.seek(partition, offset)

    async def _poll(self, consumer: AIOKafkaConsumer) -> None:
        polling = asyncio.ensure_future(consumer.getmany(timeout_ms=_POLL_MS))
        waiting = asyncio.ensure_future(self._cancels.earlier.wait())
        try:
            await asyncio.wait({polling, waiting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            polling.cancel()
            waiting.cancel()
            await asyncio.wait({polling, waiting})
        if not polling.cancelled():
            self._take(polling.result())

    def _take(self, found: Mapping[Any, Iterable[InRecord]]) -> None:
        for records in found.values():
            for record in records:
                if (request_id := read_cancel(record)) and not self._cancels.includes(request_id):
                    self._cancels.add(request_id)


def cancel_record(topic: str, request_id: str, *, time_ns: int) -> OutRecord:
    """The record that ends a request wherever it runs."""
    message = events_pb2.Cancel(request_id=request_id, time=wire.timestamp(time_ns))
    headers = ((HEADER_TYPE, b"cancel"), (HEADER_CONTENT_TYPE, wire.JSON.encode()))
    return OutRecord(topic=topic, key=request_id.encode(), value=wire.to_bytes(message), headers=headers)


def read_cancel(record: InRecord) -> str:
    """The id that a record of the control topic cancels; "" for anything else."""
    headers = dict(record.headers)
    message = events_pb2.Cancel()
    if headers.get(HEADER_TYPE, b"cancel") != b"cancel":
        return ""
    try:
        if headers.get(HEADER_CONTENT_TYPE, b"") == wire.PROTOBUF.encode():
            message.ParseFromString(record.value or b"")
        else:
            json_format.Parse(record.value or b"", message, ignore_unknown_fields=True)
    except (DecodeError, json_format.ParseError, UnicodeDecodeError):
        return ""
    return message.request_id
