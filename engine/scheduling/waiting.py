"""Sequences that wait, in policy order, and the rule by which a smaller one may pass a larger one.

The rule: sequences are let in in policy order. One that does not fit now is passed by those behind it that do, at most
`MAX_OVERTAKES` times; from then on nothing behind it is let in until it is. As what runs ends and the block pool holds every
accepted request alone (I7), it is then let in within the running sequences' remaining tokens: neither side starves. At most
`MAX_SKIPPED` sequences are passed over in one step, which bounds the time of a look.
Guarantees I3: order is the key's alone, however sequences come and go.
"""

from bisect import bisect_left, insort
from operator import attrgetter

from engine.scheduling.sequence import Sequence

MAX_OVERTAKES = 32
MAX_SKIPPED = 16
_KEY = attrgetter("key")


class OrderedSequences:
    """Sequences in ascending key. Adding and removing cost O(log n) comparisons and one memory move."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[Sequence] = []

    def __len__(self) -> int:
        return len(self.items)

    def add(self, sequence: Sequence) -> None:
        """Puts it in its place."""
        insort(self.items, sequence, key=_KEY)

    def remove(self, sequence: Sequence) -> None:
        """Takes it out. Raises `RuntimeError` when it is not there."""
        i = bisect_left(self.items, sequence.key, key=_KEY)
        if i == len(self.items) or self.items[i] is not sequence:
            raise RuntimeError(f"the sequence with key {sequence.key} is not in this queue")
        del self.items[i]
