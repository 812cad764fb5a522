"""The intake's budget in tokens: how much is taken and unfinished, and whether more may be taken, with hysteresis.

Invariants: `used` is the sum of what is held; each hold is released once. Batch-class topics stop at half of the marks, so that
under load they are the first to wait. Pure: the consumer pauses and resumes by what this says.
"""

from typing import Literal

QueueClass = Literal["interactive", "standard", "batch"]

_SHARE: dict[QueueClass, float] = {"interactive": 1.0, "standard": 1.0, "batch": 0.5}
BYTES_PER_TOKEN = 4
"""Rough size of a token in a prompt's bytes; only back-pressure rests on it, never correctness."""


class IntakeBudget:
    """Opens and closes the intake per class."""

    def __init__(self, *, high: int, low: int) -> None:
        """Taking stops above `high` tokens and goes on at or below `low`."""
        if not 0 <= low <= high or high < 1:
            raise ValueError("0 <= low <= high and high >= 1 must hold")
        self._high, self._low = high, low
        self._closed: dict[QueueClass, bool] = dict.fromkeys(_SHARE, False)
        self.used = 0

    def hold(self, tokens: int) -> None:
        """Counts a record that was taken."""
        self.used += tokens
        for name, share in _SHARE.items():
            if self.used > self._high * share:
                self._closed[name] = True

    def release(self, tokens: int) -> None:
        """Counts it as finished and written."""
        self.used -= tokens
        if self.used < 0:
            raise RuntimeError("more tokens were released than held")
        for name, share in _SHARE.items():
            if self.used <= self._low * share:
                self._closed[name] = False

    def open(self, name: QueueClass) -> bool:
        """Whether topics of this class may be read."""
        return not self._closed[name]


def estimate(value: bytes | None, headers_bytes: int = 0) -> int:
    """Tokens that a record will cost at a guess, from its size alone: it is held before the record is decoded."""
    return 16 + (len(value or b"") + headers_bytes) // BYTES_PER_TOKEN
