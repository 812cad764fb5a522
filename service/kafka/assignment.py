"""From an assignment to open partitions: read what was committed, keep or begin anew, commit this owner's epoch, seek, open.

Guarantees: a partition that is still this owner's (its committed epoch is the one held here) keeps its tracker and its running
generations; any other begins with the epoch after the committed one, which is committed before the first record is taken, so that
no epoch is ever used by two owners. Offsets committed as done are not handed out again.
"""

import asyncio
from collections.abc import Sequence

import structlog
from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as ClientPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError, IllegalStateError, KafkaError

from service.kafka.committer import Committer
from service.kafka.ownership import OwnedPartition, Partitions
from service.kafka.records import TopicPartition
from service.kafka.tracker import PartitionTracker, Progress, decode

_log = structlog.get_logger(__name__)

_RETRY_MIN_S, _RETRY_MAX_S = 0.1, 5.0


class Assignment:
    """One assignment of the group; `open` is its task, cancelled when the next rebalance begins."""

    def __init__(
        self,
        *,
        consumer: AIOKafkaConsumer,
        admin: AIOKafkaAdminClient,
        partitions: Partitions,
        committer: Committer,
        group_id: str,
        window: int,
    ) -> None:
        self._consumer, self._admin = consumer, admin
        self._partitions, self._committer = partitions, committer
        self._group_id, self._window = group_id, window

    async def open(self, assigned: Sequence[TopicPartition]) -> None:
        """Opens all of `assigned`, retrying until it has or is cancelled."""
        pause_s = _RETRY_MIN_S
        while assigned:
            try:
                await self._open(assigned)
            except (KafkaError, IllegalStateError, TimeoutError) as error:
                _log.info("assigned partitions are not open yet", error=type(error).__name__)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _RETRY_MAX_S)
            else:
                return

    async def _open(self, assigned: Sequence[TopicPartition]) -> None:
        asked = [ClientPartition(*partition) for partition in assigned]
        # The consumer's own `committed()` drops the metadata.
        committed = await self._admin.list_consumer_group_offsets(self._group_id, partitions=asked)
        if missing := [partition for partition in asked if partition not in committed]:
            # Asked for by name, a partition without a commit comes back as -1. The client drops the answer's own error (the
            # coordinator moves, or loads): taken for "never committed", it would hand the whole log out again.
            raise GroupCoordinatorNotAvailableError(f"the group's progress was not told for {len(missing)} partitions")
        begins = await self._consumer.beginning_offsets(asked)
        ends = await self._consumer.end_offsets(asked)
        opened: list[OwnedPartition] = []
        fresh: dict[ClientPartition, tuple[int, str]] = {}
        for partition in asked:
            point = committed[partition]
            low, progress = point.offset, decode(point.metadata)
            held = self._partitions.get(TopicPartition(*partition))
            if held is not None and low >= 0 and held.epoch == progress.epoch and held.tracker.next_offset <= ends[partition]:
                opened.append(held)
                continue
            owned = self._begin(partition, low, progress, begins[partition], ends[partition])
            fresh[partition] = owned.tracker.commit_point()
            opened.append(owned)
        if fresh:
            await self._consumer.commit(fresh)
        for owned in opened:
            self._admit(owned)

    def _begin(self, partition: ClientPartition, low: int, progress: Progress, begin: int, end: int) -> OwnedPartition:
        done = progress.done
        if low > end:
            _log.warning(
                "the log ends before the committed offset: the topic was made anew",
                topic=partition.topic,
                committed=low,
                end=end,
            )
            low, done = begin, 0
        elif low < begin:
            # Retention has removed what lies before: gone by configuration, or there never was a commit.
            done = done >> (begin - low) if low >= 0 else 0
            low = begin
        tracker = PartitionTracker(low=low, epoch=progress.epoch + 1, done=done, window=self._window)
        return OwnedPartition(TopicPartition(*partition), tracker, redelivered_below=min(progress.next_offset, end))

    def _admit(self, owned: OwnedPartition) -> None:
        partition = ClientPartition(*owned.partition)
        self._consumer.seek(partition, owned.tracker.next_offset)
        if self._partitions.get(owned.partition) is not owned:
            self._partitions.put(owned)
        owned.open()
        self._consumer.resume(partition)
        self._committer.reopened(owned)
