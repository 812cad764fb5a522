"""Idempotency keys of one partition: the same key within the window gives the same result, generated once.

Guarantees: of prompts with one key the first runs and the others wait for it; a finished result is remembered until `max_age_ms` have
passed or `max_keys` newer ones have come; a failed one is not, so that a retry runs. The window survives its owner: a result record
carries its key, and `low`, which rides in the commit, is where a new owner begins to read them.
Holds where results stand, never their content. Pure: knows no client.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

MAX_KEYS = 10_000
MAX_AGE_MS = 600_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """The result of a key stands on the results topic at or above `result_offset`, keyed by `request_id`.

    `digest`: of its prompt's value.
    """

    result_offset: int
    request_id: str
    digest: bytes
    time_ms: int


class IdempotencyWindow:
    """The keys that one owner of a partition knows of. `end`: an offset of the results topic that no result to come is below."""

    def __init__(
        self, *, end: int = 0, max_keys: int = MAX_KEYS, max_age_ms: int = MAX_AGE_MS, wall_ms: Callable[[], int] = lambda: 0
    ) -> None:
        self._end, self._max_keys, self._max_age_ms, self._wall_ms = end, max_keys, max_age_ms, wall_ms
        self._known: dict[bytes, Known] = {}
        self._running: dict[bytes, tuple[int, asyncio.Event]] = {}

    def __len__(self) -> int:
        return len(self._known)

    @property
    def end(self) -> int:
        """No result to come stands below this offset."""
        return self._end

    @property
    def low(self) -> int:
        """No result whose key is remembered, or will be, stands below this offset."""
        self._expire()
        # Keys are remembered in the order in which their results became durable, which is that of the topic.
        return next((known.result_offset for known in self._known.values()), self._end)

    async def claim(self, key: bytes, offset: int) -> Known | None:
        """What is known of `key`, once no prompt runs under it; None: the prompt at `offset` is to run, and to `settle` in any case."""
        while (running := self._running.get(key)) is not None:
            await running[1].wait()
        self._expire()
        if (known := self._known.get(key)) is None:
            self._running[key] = (offset, asyncio.Event())
        return known

    def settle(self, key: bytes, offset: int, known: Known | None) -> None:
        """The prompt at `offset` has a finished result, or (None) gives `key` back; nothing unless it holds the claim."""
        running = self._running.get(key)
        if running is None or running[0] != offset:
            return
        del self._running[key]
        if known is not None:
            self.restore(key, known)
        running[1].set()

    def restore(self, key: bytes, known: Known) -> None:
        """`key` had this result."""
        self._known.pop(key, None)
        self._known[key] = known
        if len(self._known) > self._max_keys:
            del self._known[next(iter(self._known))]

    def forget(self, key: bytes) -> None:
        """The result of `key` is gone from its topic."""
        self._known.pop(key, None)

    def written(self, end: int) -> None:
        """The results topic is known to reach up to `end`."""
        self._end = max(self._end, end)

    def _expire(self) -> None:
        oldest_ms = self._wall_ms() - self._max_age_ms
        while self._known:
            key = next(iter(self._known))
            if self._known[key].time_ms >= oldest_ms:
                return
            del self._known[key]
