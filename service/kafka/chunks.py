"""Tokens to the chunk topic as they are made: a `Started` record opens an attempt, then chunks in order, `Handover` where it is given up.

Guarantees: one request's records are in order on the partition of its prompt, keyed by its id; the first tokens go at once, then
at most once in `interval_s`, or with `max_tokens` tokens; `finish` returns once all of them are acknowledged, and the listener has
heard of each then. Memory is bounded by a request's own tokens: while the broker does not take records, deltas merge, up to what
one record may hold. A chunk that can never be written is logged and left out: the result is authoritative.
"""

import asyncio
import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog
from aiokafka.errors import KafkaError

from schemas.v1 import events_pb2, inference_pb2
from service import wire
from service.contract import Delta, Source, Started
from service.errors import RequestError
from service.kafka.chunk_records import ChunkMessage, chunk_record
from service.kafka.output import Output

_log = structlog.get_logger(__name__)

_RETRY_S = 0.5
_MAX_MERGED_TOKENS = 256
"""With twenty logprobs a token still well below the megabyte that brokers take by default."""


class LiveListener(Protocol):
    """Hears of a durable request only what is durable, so that no viewer sees what a new owner could not know. Must not block."""

    def acknowledged(self, source: Source, message: ChunkMessage, offset: int) -> None:
        """A record of the request stands at `offset` of the chunk topic; in the order of the records."""
        ...

    def ended(self, source: Source, result: inference_pb2.Result) -> None:
        """Its terminal record is durable (and committed, where there are transactions)."""
        ...


class ChunkWriter:
    """The pump that writes the chunks of every running request. `run` is its task."""

    def __init__(
        self,
        output: Output,
        *,
        topic: str,
        interval_s: float,
        max_tokens: int,
        wall_ns: Callable[[], int],
        listener: LiveListener | None = None,
    ) -> None:
        self._output = output
        self.listener = listener
        self._topic = topic
        self._interval_s = interval_s
        self._max_tokens = max_tokens
        self._wall_ns = wall_ns
        self._urgent: dict[ChunkStream, None] = {}
        self._waiting: dict[ChunkStream, None] = {}
        self._handing_over: set[ChunkStream] = set()
        self._due_s = 0.0
        self._written_s = -math.inf
        self._wake = asyncio.Event()

    def open(
        self,
        source: Source,
        *,
        media_type: str,
        epoch: int,
        attempt: int,
        traceparent: str = "",
        resume_from: Sequence[int] = (0,),
        written: Callable[[int], None] = lambda end: None,
    ) -> "ChunkStream":
        """The chunks of one attempt at one request.

        `resume_from`: tokens that earlier attempts said, one number a choice. `written` hears how far the chunk topic reaches.
        """
        return ChunkStream(
            self, source, media_type=media_type, epoch=epoch, attempt=attempt, traceparent=traceparent,
            resume_from=resume_from, written=written,
        )  # fmt: skip

    async def flush(self) -> None:
        """Returns once every hand-over so far is acknowledged. Bound it by cancelling it."""
        for stream in tuple(self._handing_over):
            await stream.finish()

    async def run(self) -> None:
        """Writes until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not self._urgent and (remaining_s := self._due_s - loop.time()) > 0:
                # Only patient streams: they gather until the oldest is due, unless an urgent one comes.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(remaining_s):
                        await self._wake.wait()
                self._wake.clear()
            streams, self._urgent = self._urgent, {}
            if self._waiting and loop.time() >= self._due_s:
                streams, self._waiting = {**streams, **self._waiting}, {}
            for stream in streams:
                self._waiting.pop(stream, None)
                await stream.write()
            self._written_s = loop.time()
            if self._waiting or self._urgent:
                self._wake.set()

    def ready(self, stream: "ChunkStream", *, urgent: bool) -> None:
        """`stream` has something to write."""
        if urgent:
            self._urgent[stream] = None
            self._wake.set()
        elif stream not in self._waiting:
            if not self._waiting:
                # Tokens come in paces already: what comes after a pause has gathered, and goes at once.
                self._due_s = self._written_s + self._interval_s
                self._wake.set()
            self._waiting[stream] = None

    async def send(self, source: Source, media_type: str, message: ChunkMessage) -> "asyncio.Future[int]":
        """Hands one record over; the answer is its offset."""
        return await self._output.send(chunk_record(self._topic, source, message, media_type))

    def handing_over(self, stream: "ChunkStream", begun: bool) -> None:
        """A hand-over has begun, or is through."""
        (self._handing_over.add if begun else self._handing_over.discard)(stream)

    @property
    def max_tokens(self) -> int:
        return self._max_tokens

    def now_ns(self) -> int:
        """Wall clock."""
        return self._wall_ns()


class ChunkStream:
    """One attempt's chunks. `started` first, then `delta`s, then `finish`, `hand_over` or `drop`."""

    def __init__(
        self,
        writer: ChunkWriter,
        source: Source,
        *,
        media_type: str,
        epoch: int,
        attempt: int,
        traceparent: str,
        resume_from: Sequence[int],
        written: Callable[[int], None],
    ) -> None:
        self._writer = writer
        self._source = source
        self._media_type = media_type
        self._epoch, self._attempt = epoch, attempt
        self._traceparent = traceparent
        self._resume_from = list(resume_from)
        self._said = list(resume_from)
        self._written = written
        self._opening: events_pb2.Started | None = None
        self._closing: events_pb2.Handover | None = None
        self._pending: dict[int, list[Delta]] = {}
        self._gathered = 0
        self._any_written = False
        self._unanswered: deque[tuple[ChunkMessage, asyncio.Future[int]]] = deque()
        self._answered = asyncio.Event()
        self._answered.set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._closed = self._dropped = self._opened = False
        self.num_written = 0

    def started(self, event: Started) -> None:
        """Opens the attempt."""
        self._opening = events_pb2.Started(
            request_id=self._source.request_id,
            epoch=self._epoch,
            attempt=self._attempt,
            resume_from=self._resume_from,
            seed=event.seed,
            traceparent=self._traceparent,
            time=wire.timestamp(self._writer.now_ns()),
            model=event.model,
            prompt_tokens=event.prompt_tokens,
        )
        self._announce(urgent=False)

    def delta(self, event: Delta) -> None:
        """Adds tokens; never waits."""
        if self._closed:
            return
        held = self._pending.setdefault(event.choice, [])
        if held and len(held[-1].token_ids) + len(event.token_ids) <= _MAX_MERGED_TOKENS:
            held[-1] = held[-1].merged_with(event)
        else:
            held.append(event)
        self._gathered += len(event.token_ids)
        self._said += [0] * (event.choice + 1 - len(self._said))
        self._said[event.choice] = event.seq + len(event.token_ids)
        self._announce(urgent=not self._any_written or self._gathered >= self._writer.max_tokens)

    async def finish(self) -> None:
        """Returns once everything said is acknowledged (or found to be unwritable)."""
        if not self._empty.is_set():
            self._writer.ready(self, urgent=True)
        await self._empty.wait()
        await self._answered.wait()

    def hand_over(self) -> None:
        """Ends the attempt for another owner to go on: what was said is written with a mark behind it; never waits."""
        if self._closed:
            return
        if not self._opened:
            # It was not even begun.
            self.drop()
            return
        self._closing = events_pb2.Handover(request_id=self._source.request_id, epoch=self._epoch, resume_from=self._said)
        self._announce(urgent=True)
        self._closed = True
        self._writer.handing_over(self, True)

    def drop(self) -> None:
        """Writes nothing more: the request is not this owner's any longer."""
        self._closed = self._dropped = True
        self._opening, self._closing, self._pending, self._gathered = None, None, {}, 0
        self._empty.set()

    async def write(self) -> None:
        """For the writer: hands over what is pending, in order."""
        if self._opening is not None:
            opening, self._opening, self._opened = self._opening, None, True
            await self._send(opening)
        pending, self._pending, self._gathered = self._pending, {}, 0
        for delta in itertools.chain.from_iterable(pending.values()):
            self._any_written = True
            chunk = wire.chunk_to_proto(
                delta,
                request_id=self._source.request_id,
                epoch=self._epoch,
                attempt=self._attempt,
                time_ns=self._writer.now_ns(),
            )
            await self._send(chunk)
        if self._closing is not None and not self._pending:
            closing, self._closing = self._closing, None
            await self._send(closing)
        if not self._pending:
            self._empty.set()

    async def _send(self, message: ChunkMessage) -> None:
        while not self._dropped:
            try:
                acknowledged = await self._writer.send(self._source, self._media_type, message)
            except RequestError as error:
                _log.warning("a chunk is left out", request_id=self._source.request_id, code=error.code)
                return
            except (KafkaError, OSError) as error:
                # The client has waited already; in order means that nothing may overtake this record.
                _log.debug("a chunk waits for the broker", error=type(error).__name__)
                await asyncio.sleep(_RETRY_S)
                continue
            self.num_written += 1
            self._unanswered.append((message, acknowledged))
            self._answered.clear()
            acknowledged.add_done_callback(self._settle)
            return

    def _settle(self, _: "asyncio.Future[int]") -> None:
        """Takes the answers that have come, in the order of the records."""
        while self._unanswered and self._unanswered[0][1].done():
            message, acknowledged = self._unanswered.popleft()
            error = None if acknowledged.cancelled() else acknowledged.exception()
            if error is not None or acknowledged.cancelled():
                _log.warning("a chunk was refused", request_id=self._source.request_id, error=type(error).__name__)
            else:
                offset = acknowledged.result()
                self._written(offset + 1)
                if self._writer.listener is not None:
                    self._writer.listener.acknowledged(self._source, message, offset)
            if isinstance(message, events_pb2.Handover):
                self._writer.handing_over(self, False)
        if not self._unanswered:
            self._answered.set()

    def _announce(self, *, urgent: bool) -> None:
        if self._closed:
            return
        self._empty.clear()
        self._writer.ready(self, urgent=urgent)
