"""A prompt that has ended, and what takes it from there: the border between the handler and the two ways of making it durable."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from opentelemetry.trace import Link

from service.kafka.ownership import OwnedPartition
from service.kafka.records import OutRecord, TopicPartition


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A prompt that has ended. `records`: its terminal records, empty for a tombstone.

    `replacement` is asked when one of these is refused for its size: told how many are taken by then, it gives what to write in
    place of the rest. `settled` is called once: True when the records are durable and the offset is done, False when the partition
    was lost before; right before a True, `written` hears the records' offsets, where they are known. `links`: the prompt's span, for
    the commit that it is part of.
    """

    owned: OwnedPartition
    offset: int
    records: tuple[OutRecord, ...]
    replacement: Callable[[int], tuple[OutRecord, ...]]
    settled: Callable[[bool], None]
    written: Callable[[Sequence[int]], None] = lambda offsets: None
    links: tuple[Link, ...] = ()


class Commits(Protocol):
    """Makes completions durable and commits offsets: at least once (`committer.py`) or exactly once (`transactional.py`)."""

    async def fence(self, partition: TopicPartition) -> None:
        """Before a new owner reads what was committed: nothing of an earlier owner lands after this. Raises what may pass."""
        ...

    async def claim(self, partition: TopicPartition, point: tuple[int, str]) -> None:
        """Commits a new owner's first progress, as its predecessor left it but for the epoch: not if anybody has fenced since.

        Raises what may pass.
        """
        ...

    def opened(self, owned: OwnedPartition) -> None:
        """A partition is open, or open again."""
        ...

    def submit(self, completion: Completion) -> None:
        """Takes a completion over; never waits."""
        ...

    async def flush(self, timeout_s: float) -> bool:
        """True once everything submitted is durable and committed, or another's; False when that takes longer (it goes on)."""
        ...

    async def run(self) -> None:
        """Works until cancelled; what is left then is settled as lost: its prompts come again."""
        ...
