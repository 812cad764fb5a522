"""What one stream has yet to send: bounded, since deltas that wait are merged and reading stops at the bound.

Guarantees: per choice, tokens and text leave in order, once each; `Started` leaves first, the terminal event last. While a
message waits, at most one delta a choice is kept, so that its overhead does not grow with the wait; from `max_bytes` on
the one who fills it waits for `room` (the generation goes on: its own buffer is bounded by max_tokens). One filler,
one taker, one event loop. Knows no gRPC.
"""

import asyncio
from collections.abc import Sequence

from service.contract import Delta, ReaderEvent, Reset, Started

_TOKEN_BYTES = 4
_ENTRY_BYTES = 48


class Outbox:
    """Pending events of one stream; see the module."""

    def __init__(self, max_bytes: int, after: Sequence[int] = ()) -> None:
        """`after`: tokens that the reader has from before, one number a choice."""
        self._max_bytes = max_bytes
        self._bytes = 0
        self._sending_bytes = 0
        self._started: Started | None = None
        self._before: list[ReaderEvent] = []
        self._deltas: dict[int, Delta] = {}
        self._end: ReaderEvent | None = None
        self._opened: set[int] = set()
        self._error: BaseException | None = None
        self._filled = asyncio.Event()
        self._urgent = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self.num_merges = 0
        self.said: list[int] = list(after)
        """Tokens said so far, one count a choice, sent or not."""

    @property
    def num_bytes(self) -> int:
        """About what the events that are not sent take, in memory and on the wire."""
        return self._bytes + self._sending_bytes

    def put(self, event: ReaderEvent) -> None:
        """Adds an event of the generation."""
        if isinstance(event, Started):
            self._started = event
            self._urgent.set()
        elif isinstance(event, Delta):
            self._put_delta(event)
        elif isinstance(event, Reset):
            # What was said before it leaves before it, unmerged with what follows.
            self._before += [*self._deltas.values(), event]
            self._deltas = {}
            self.said = list(event.resume_from)
        else:
            self._end = event
            self._urgent.set()
        self._filled.set()

    def _put_delta(self, delta: Delta) -> None:
        self.said.extend([0] * (delta.choice + 1 - len(self.said)))
        self.said[delta.choice] = delta.seq + len(delta.token_ids)
        waiting = self._deltas.get(delta.choice)
        if waiting is not None:
            self.num_merges += 1
        self._deltas[delta.choice] = delta if waiting is None else waiting.merged_with(delta)
        self._bytes += _size(delta)
        if self.num_bytes >= self._max_bytes:
            self._room.clear()
        # A choice's first token goes out at once: it is what the reader waits for.
        if delta.choice not in self._opened or self._bytes >= self._max_bytes:
            self._urgent.set()

    def close(self, error: BaseException) -> None:
        """No more will come, for this reason: the taker sends what waits, then finds the reason in `error`. The first one counts."""
        if self._error is None:
            self._error = error
        self._filled.set()
        self._urgent.set()

    @property
    def error(self) -> BaseException | None:
        """Why no more will come; None while more may."""
        return self._error

    async def room(self) -> None:
        """Returns once less than `max_bytes` wait."""
        await self._room.wait()

    @property
    def filled(self) -> bool:
        """Whether something waits, or no more will come."""
        return self._filled.is_set()

    async def wait(self) -> None:
        """Returns once something waits, or no more will come."""
        await self._filled.wait()

    async def wait_urgent(self) -> None:
        """Returns once something waits that should not be held back for company."""
        await self._urgent.wait()

    def take(self) -> list[ReaderEvent]:
        """All that waits, in the order to send it. It counts against the bound until `sent`."""
        events: list[ReaderEvent] = [] if self._started is None else [self._started]
        events.extend(self._before)
        events.extend(self._deltas.values())
        self._opened.update(event.choice for event in events if isinstance(event, Delta))
        if self._end is not None:
            events.append(self._end)
        self._sending_bytes += self._bytes
        self._started, self._end, self._bytes = None, None, 0
        self._before, self._deltas = [], {}
        self._filled.clear()
        self._urgent.clear()
        return events

    def sent(self) -> None:
        """All that was taken has been handed to the transport."""
        self._sending_bytes = 0
        if self._bytes < self._max_bytes:
            self._room.set()


def _size(delta: Delta) -> int:
    entries = sum(1 + len(entry.top) for entry in delta.logprobs or ())
    return len(delta.token_ids) * _TOKEN_BYTES + len(delta.text.encode("utf-8", "replace")) + entries * _ENTRY_BYTES
