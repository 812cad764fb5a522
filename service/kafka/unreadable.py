"""Partitions whose next record the client library cannot read: found among the others, held back alone, tried again now and then.

Nothing of such a partition is passed over or lost: it goes on once its record is readable (a codec was installed) or gone. A poll of
several partitions does not tell which one failed, so all of them become suspects: polled one at a time, one record at a time, until
each was read, or failed alone. Knows no client beyond its errors.
"""

import asyncio
import zlib
from collections.abc import Iterable, Sequence

from aiokafka.errors import CorruptRecordException, UnsupportedCodecError

from service.kafka.records import TopicPartition

# The client unpacks batches as they are polled: a codec that is not here, bytes that do not unpack, a header name that is no UTF-8.
UNREADABLE = (UnsupportedCodecError, CorruptRecordException, UnicodeDecodeError, zlib.error, EOFError)

_SUSPECT_S = 1.0
_RETRY_S = 10.0


class Unreadable:
    """Which partitions are suspected, and which are held back. Times are the running loop's."""

    def __init__(self) -> None:
        self._suspects: dict[TopicPartition, float] = {}
        self._held: dict[TopicPartition, float] = {}
        self._reasons: dict[TopicPartition, str] = {}

    @property
    def reason(self) -> str:
        """What is held back and why; "" when nothing is."""
        return "; ".join(self._reasons.values())

    def failed(self, partitions: Sequence[TopicPartition], offset: int, error: BaseException) -> bool:
        """A poll of `partitions` failed. True when that settles it: the one asked for is held back now, from `offset` on."""
        now = asyncio.get_running_loop().time()
        if len(partitions) == 1 and partitions[0] in self._suspects:
            (partition,) = partitions
            del self._suspects[partition]
            self._held[partition] = now + _RETRY_S
            where = f"{partition.topic}-{partition.partition} from offset {offset} on"
            why = str(error) if isinstance(error, UnsupportedCodecError) else type(error).__name__
            self._reasons[partition] = f"{where} cannot be read ({why})"
            return True
        self._suspects.update(dict.fromkeys(partitions, now + _SUSPECT_S))
        return False

    def read(self, partition: TopicPartition) -> None:
        """A poll of `partition` alone gave records, or nothing is there."""
        self._suspects.pop(partition, None)
        self._reasons.pop(partition, None)

    def holds(self, partition: TopicPartition) -> bool:
        """Whether `partition` may not be polled now. Once its time is over it is a suspect that is tried alone."""
        until = self._held.get(partition)
        now = asyncio.get_running_loop().time()
        if until is not None and now >= until:
            del self._held[partition]
            self._suspects[partition] = now + _SUSPECT_S
            return False
        return until is not None

    def suspect(self, partitions: Iterable[TopicPartition]) -> TopicPartition | None:
        """The one of `partitions` to poll alone next, in turns; None when none is suspected."""
        now = asyncio.get_running_loop().time()
        for partition, until in tuple(self._suspects.items()):
            if now >= until:
                self.read(partition)
        found = next((partition for partition in self._suspects if partition in frozenset(partitions)), None)
        if found is not None:
            self._suspects[found] = self._suspects.pop(found)
        return found

    def limit(self, partitions: Sequence[TopicPartition], usual: int) -> int:
        """Records to ask for: one where a suspect is among `partitions`, so that what stands before a bad record is read."""
        return 1 if any(partition in self._suspects for partition in partitions) else usual

    def forget(self) -> None:
        """The partitions are assigned anew."""
        self._suspects.clear()
        self._held.clear()
        self._reasons.clear()
