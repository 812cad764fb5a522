"""The requests that run here, as far as Kafka has them: what a reader on this replica is shown from memory.

Guarantees: a message is given out once its record is acknowledged, so that no reader has seen what a new owner cannot know; each
reader gets all of a request's messages in their order, from the first on, then its result once that is durable, or nothing more when
this replica gave the request up. Bounded: a request's own chunks, kept while it runs, shared by all of its readers.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from schemas.v1 import events_pb2, inference_pb2
from service.contract import Source
from service.kafka.chunk_records import ChunkMessage
from service.kafka.reader_fold import Terminal


class LiveRequest:
    """One request under way."""

    def __init__(self) -> None:
        self._messages: list[ChunkMessage | Terminal] = []
        self._over = False
        self.resume_from: tuple[int, ...] = ()
        """Tokens that stand before the first message, one number a choice."""
        self.traceparent = ""
        """Of the latest attempt."""
        self._waiting: list[asyncio.Future[None]] = []

    def add(self, message: ChunkMessage | Terminal) -> None:
        """The next message."""
        if isinstance(message, events_pb2.Started) and not self._messages:
            self.resume_from = tuple(message.resume_from)
        self._messages.append(message)
        if isinstance(message, events_pb2.Started):
            self.traceparent = message.traceparent
        self._notify()

    def end(self) -> None:
        """Nothing more comes."""
        self._over = True
        self._notify()

    def serves(self, after: Sequence[int], after_text: Sequence[int]) -> bool:
        """Whether what is here is all that a reader with these counts of tokens and characters lacks."""
        for index, start in enumerate(self.resume_from):
            tokens = after[index] if index < len(after) else 0
            characters = after_text[index] if index < len(after_text) else -1
            if start and (tokens < start or characters < 0):
                return False
        return True

    async def messages(self) -> AsyncIterator[ChunkMessage | Terminal]:
        """All of them from the first on, as they come; a `Terminal` is the last. Ends without one when the request went elsewhere."""
        taken = 0
        while True:
            while taken < len(self._messages):
                taken += 1
                yield self._messages[taken - 1]
            if self._over:
                return
            changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(changed)
            await changed

    def _notify(self) -> None:
        # Nobody waits for most of them.
        waiting, self._waiting = self._waiting, []
        for changed in waiting:
            if not changed.done():
                changed.set_result(None)


class LiveRequests:
    """All of them, by request id: the chunk writer's `LiveListener`."""

    def __init__(self, on_end: Callable[[Terminal], None] = lambda terminal: None) -> None:
        """`on_end` hears of each durable result."""
        self._on_end = on_end
        self._running: dict[str, LiveRequest] = {}

    def __len__(self) -> int:
        return len(self._running)

    def get(self, request_id: str) -> LiveRequest | None:
        """The request, while it runs here."""
        return self._running.get(request_id)

    def acknowledged(self, source: Source, message: ChunkMessage, offset: int) -> None:
        """A record of the request is durable: its first `Started` begins it here, a `Handover` ends it here."""
        running = self._running.get(source.request_id)
        if running is None:
            if not isinstance(message, events_pb2.Started):
                return
            running = self._running[source.request_id] = LiveRequest()
        running.add(message)
        if isinstance(message, events_pb2.Handover):
            del self._running[source.request_id]
            running.end()

    def ended(self, source: Source, result: inference_pb2.Result) -> None:
        """Its terminal record is durable."""
        running = self._running.pop(source.request_id, None)
        terminal = Terminal(result=result, traceparent="" if running is None else running.traceparent)
        self._on_end(terminal)
        if running is not None:
            running.add(terminal)
            running.end()
