"""How old the oldest prompt of a partition is that has not ended: the measure that lag cannot hide behind.

Guarantee: while a partition that is owned here holds an unfinished prompt, taken or not, its age grows; pausing does not stop it. What
was never fetched (a partition held back since before its record came) counts from when lag was first seen: a lower bound.
Pure: the consumer says what it takes, what ends, and where the log ends.
"""

from dataclasses import dataclass, field

from service.kafka.records import TopicPartition


@dataclass(slots=True)
class _Ages:
    running: dict[int, int] = field(default_factory=dict)
    refused: tuple[int, int] | None = None
    unread_since_ms: int | None = None


class Backlog:
    """Times are milliseconds since the epoch, as the records' timestamps are."""

    def __init__(self) -> None:
        self._partitions: dict[TopicPartition, _Ages] = {}

    def took(self, partition: TopicPartition, offset: int, timestamp_ms: int) -> None:
        """A record was handed out for work."""
        ages = self._partitions.setdefault(partition, _Ages())
        ages.running[offset] = timestamp_ms
        ages.unread_since_ms = None
        if ages.refused is not None and ages.refused[0] <= offset:
            ages.refused = None

    def refused(self, partition: TopicPartition, offset: int, timestamp_ms: int) -> None:
        """A record was seen that may not be taken yet."""
        self._partitions.setdefault(partition, _Ages()).refused = (offset, timestamp_ms)

    def ended(self, partition: TopicPartition, offset: int) -> None:
        """What was taken is durable, or given back."""
        if (ages := self._partitions.get(partition)) is not None:
            ages.running.pop(offset, None)

    def forget(self, partition: TopicPartition) -> None:
        """The partition is another's."""
        self._partitions.pop(partition, None)

    def seconds(self, partition: TopicPartition, *, next_offset: int, end: int, now_ms: int) -> float:
        """The age of the oldest prompt at or above the committed offset that has not ended; 0.0 when there is none.

        `next_offset`: the first that was not taken; `end`: of the log.
        """
        ages = self._partitions.setdefault(partition, _Ages())
        since = list(ages.running.values())
        if end > next_offset:
            if ages.unread_since_ms is None:
                ages.unread_since_ms = now_ms
            since.append(ages.refused[1] if ages.refused is not None else ages.unread_since_ms)
        else:
            ages.unread_since_ms = ages.refused = None
        known = [stamp for stamp in since if stamp > 0]
        return max(now_ms - min(known), 0) / 1_000 if known else 0.0
