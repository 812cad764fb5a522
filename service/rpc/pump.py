"""Moves one generation's events into one gRPC stream: first token at once, then one in `coalesce_ms`, or what gathers behind a write.

Guarantees: at most `stream_buffer_bytes` wait here; a reader that takes nothing for `slow_reader_timeout_s` ends the stream with
`SlowReader`; a silent stream gets a heartbeat each `heartbeat_s`; the generation is never made to wait for longer than its own
buffer. Whatever ends the pump, its reading side is ended with it. Knows no status codes.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from schemas.v1 import inference_pb2
from service import wire
from service.config import GrpcSection
from service.contract import Delta, Failed, Finished, ReaderEvent, Reset, Started
from service.rpc.outbox import Outbox

Write = Callable[[inference_pb2.StreamEvent], Awaitable[None]]

_SOON_S = 0.002
"""Less is not worth a timer: tokens come in paces already (`service/streams.py`)."""


class SlowReader(Exception):
    """The reader took nothing for the time that is allowed."""


class HandedOver(Exception):
    """This replica gives the stream up; its client may go on elsewhere from what it was told."""


class Pump:
    """One stream. `run` returns the terminal event once it is written."""

    def __init__(self, section: GrpcSection, request_id: str, write: Write, *, after: Sequence[int] = ()) -> None:
        """`after`: tokens that the reader has from before, one number a choice."""
        self._section = section
        self._request_id = request_id
        self._write = write
        self._outbox = Outbox(section.stream_buffer_bytes, after)
        self._epoch = 0
        self._written = self._before = sum(after)
        self._loop = asyncio.get_running_loop()
        self._sent_s = 0.0
        self.num_messages = 0
        self.num_heartbeats = 0

    @property
    def num_merges(self) -> int:
        """Deltas that were merged into one that waited."""
        return self._outbox.num_merges

    @property
    def num_tokens_sent(self) -> int:
        """Tokens handed to the transport so far, over all choices."""
        return self._written - self._before

    def hand_over(self) -> None:
        """Makes `run` send what waits, tell the reader where to go on, and raise `HandedOver`."""
        self._outbox.close(HandedOver())

    async def run(self, events: AsyncIterator[ReaderEvent]) -> Finished | Failed:
        """Pumps until the terminal event. Raises `SlowReader`, `HandedOver`, and whatever `events` or the transport raise."""
        filling = asyncio.create_task(self._fill(events), name=f"stream-{self._request_id}")
        filling.add_done_callback(self._filled)
        try:
            while True:
                await self._something()
                # Read before sending: what comes while a write waits is sent in another round before the error is raised.
                error = self._outbox.error
                end = await self._send_waiting()
                if end is not None:
                    return end
                if isinstance(error, HandedOver):
                    await self._send_reset()
                if error is not None:
                    raise error
        finally:
            filling.cancel()
            # The generator must not be running when its owner closes it.
            await asyncio.wait({filling})

    async def _fill(self, events: AsyncIterator[ReaderEvent]) -> None:
        async for event in events:
            self._outbox.put(event)
            if isinstance(event, Finished | Failed):
                return
            await self._outbox.room()
        raise RuntimeError("the generation ended without a terminal event")

    def _filled(self, filling: "asyncio.Task[None]") -> None:
        if not filling.cancelled() and (error := filling.exception()) is not None:
            self._outbox.close(error)

    async def _something(self) -> None:
        """Returns when there is something to send and it has had its time to gather; heartbeats meanwhile."""
        while not self._outbox.filled:
            try:
                async with asyncio.timeout(self._section.heartbeat_s):
                    await self._outbox.wait()
            except TimeoutError:
                await self._send_heartbeat()
        gather_s = self._sent_s + self._section.coalesce_ms / 1e3 - self._loop.time()
        if self.num_tokens_sent and gather_s > _SOON_S:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(gather_s):
                    await self._outbox.wait_urgent()

    async def _send_waiting(self) -> Finished | Failed | None:
        for event in self._outbox.take():
            if isinstance(event, Started | Reset):
                self._epoch = event.epoch
            await self._send(wire.event_to_proto(self._request_id, event, said=self._written, epoch=self._epoch))
            if isinstance(event, Delta):
                self._written += len(event.token_ids)
            elif isinstance(event, Finished | Failed):
                return event
        self._outbox.sent()
        self._sent_s = self._loop.time()
        return None

    async def _send_reset(self) -> None:
        message = inference_pb2.StreamEvent(request_id=self._request_id, seq=self._written, epoch=self._epoch)
        message.reset.resume_from.extend(self._outbox.said)
        await self._send(message)

    async def _send_heartbeat(self) -> None:
        self.num_heartbeats += 1
        message = inference_pb2.StreamEvent(request_id=self._request_id, seq=self._written, epoch=self._epoch)
        message.heartbeat.SetInParent()
        await self._send(message)

    async def _send(self, message: inference_pb2.StreamEvent) -> None:
        try:
            async with asyncio.timeout(self._section.slow_reader_timeout_s):
                await self._write(message)
        except TimeoutError:
            raise SlowReader from None
        self.num_messages += 1
