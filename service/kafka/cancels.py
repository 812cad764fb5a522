"""The cancelled requests that this replica knows of, and from which time on it has to know them.

Bounded: the newest `max_ids` are remembered. A prompt that is cancelled while it waits, and then waits through that many other
cancels, is not found among them and runs. Pure: the control topic's reader fills it.
"""

import asyncio
from collections.abc import Callable

MAX_IDS = 100_000
"""About 15 MB."""


class Cancels:
    """Filled by the reader, asked by whoever takes a prompt."""

    def __init__(
        self, *, since_ms: int, max_ids: int = MAX_IDS, on_cancel: Callable[[str], object] = lambda request_id: None
    ) -> None:
        """`since_ms`: the topic is read from this time on at first. `on_cancel` hears of each id as it comes (to end what runs)."""
        self.since_ms = since_ms
        self.earlier = asyncio.Event()
        """Set when `since_ms` has become an earlier time: what lies between is to be read."""
        self._max_ids = max_ids
        self._on_cancel = on_cancel
        self._ids: dict[str, None] = {}

    def add(self, request_id: str) -> None:
        """`request_id` was cancelled."""
        self._ids.pop(request_id, None)
        self._ids[request_id] = None
        if len(self._ids) > self._max_ids:
            del self._ids[next(iter(self._ids))]
        self._on_cancel(request_id)

    def includes(self, request_id: str) -> bool:
        """Whether it was cancelled, as far as is known now."""
        return request_id in self._ids

    def cover(self, prompt_ms: int) -> None:
        """A prompt of this time was taken: cancels from then on are wanted. 0 or less: no time is known."""
        if 0 < prompt_ms < self.since_ms:
            self.since_ms = prompt_ms
            self.earlier.set()
