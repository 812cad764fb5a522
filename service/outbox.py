"""What a caller has not read yet of its generation: events in order, deltas of one choice merged while they wait.

Bounded: one `Started`, one merged delta a choice, one terminal event; a delta is never longer than its choice. The writer never waits.
"""

import asyncio
from collections import deque

from service.choices import PendingDelta
from service.contract import Delta, Event, Failed, Finished, Started


class Outbox:
    """One writer, one reader. Nothing can be put after the terminal event."""

    def __init__(self) -> None:
        self._events: deque[Started | PendingDelta | Finished | Failed] = deque()
        self._pending: dict[int, PendingDelta] = {}
        self._arrived = asyncio.Event()
        self.ended = False
        """Whether the terminal event was put."""

    def put(self, event: Event) -> None:
        """Raises `RuntimeError` after the terminal event (invariant I6)."""
        if self.ended:
            raise RuntimeError("a request gives nothing after its terminal event")
        if isinstance(event, Delta):
            self._put_delta(event)
        else:
            self._events.append(event)
            self.ended = isinstance(event, Finished | Failed)
        self._arrived.set()

    def _put_delta(self, delta: Delta) -> None:
        pending = self._pending.get(delta.choice)
        if pending is None:
            pending = self._pending[delta.choice] = PendingDelta(delta)
            self._events.append(pending)
        pending.add(delta)

    async def take(self) -> Event | None:
        """The next event; None after the terminal one."""
        while not self._events:
            if self.ended:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        if isinstance(event, PendingDelta):
            del self._pending[event.first.choice]
            return event.merged()
        return event
