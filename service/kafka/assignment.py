"""From an assignment to an open partition: fence, read what was committed, keep or begin anew, commit this owner's epoch, seek, open.

Guarantees: a partition that is still this owner's (its committed epoch is the one held here) keeps its tracker and its running
generations; any other begins with the epoch after the committed one, which is committed before the first record is taken, so that
no epoch is ever used by two owners. Whoever wrote for it before is fenced first. Offsets committed as done are not handed out again;
those that are not come with what earlier owners had said of them. Progress that was committed for a topic which has been made anew
since is not this one's: it begins at its start, and what still ran of the old one is retired.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as ClientPartition
from aiokafka.errors import IllegalStateError, KafkaError
from aiokafka.structs import OffsetAndMetadata

from service.errors import RequestError
from service.kafka.completion import Commits
from service.kafka.idempotency import IdempotencyWindow
from service.kafka.ownership import OwnedPartition, Partitions
from service.kafka.prompt_topics import is_another
from service.kafka.records import TopicPartition
from service.kafka.result_keys import ResultKeys
from service.kafka.resume import ChunkReading
from service.kafka.tracker import PartitionTracker, Progress, decode

_log = structlog.get_logger(__name__)

_RETRY_MIN_S, _RETRY_MAX_S = 0.1, 5.0


class Assignment:
    """How partitions of one connection are opened; each `open` is a task, cancelled when the next rebalance begins."""

    def __init__(
        self,
        *,
        consumer: AIOKafkaConsumer,
        progress: Callable[[TopicPartition], Awaitable[OffsetAndMetadata]],
        partitions: Partitions,
        commits: Commits,
        reading: ChunkReading,
        result_keys: ResultKeys,
        topic_id: Callable[[str], Awaitable[str]],
        retire: Callable[[OwnedPartition], None],
        window: int,
        wall_ns: Callable[[], int],
    ) -> None:
        """`progress`: what is committed for a partition, as `membership.progress` reads it; `topic_id`: as in `TopicLook`.

        `retire` is given a partition of a topic that is there no longer.
        """
        self._consumer, self._progress = consumer, progress
        self._partitions, self._commits = partitions, commits
        self._reading, self._result_keys = reading, result_keys
        self._topic_id, self._retire = topic_id, retire
        self._window, self._wall_ns = window, wall_ns

    async def open(self, partition: TopicPartition) -> None:
        """Opens `partition`, retrying until it has or is cancelled."""
        pause_s = _RETRY_MIN_S
        while True:
            try:
                await self._open(ClientPartition(*partition))
            except (KafkaError, RequestError, IllegalStateError, OSError, TimeoutError) as error:
                _log.info(
                    "a partition is not open yet", partition=f"{partition.topic}-{partition.partition}", error=repr(error)
                )
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _RETRY_MAX_S)
            else:
                return

    async def _open(self, partition: ClientPartition) -> None:
        name = TopicPartition(*partition)
        held = self._partitions.get(name)
        topic_id = await self._topic_id(name.topic)
        if held is not None and is_another(held.tracker.topic_id, topic_id):
            self._retire(held)
        elif held is not None:
            point = await self._progress(name)
            end = (await self._consumer.end_offsets([partition]))[partition]
            if point.offset >= 0 and held.epoch == decode(point.metadata).epoch and held.tracker.next_offset <= end:
                self._admit(held)
                return
            self._partitions.lose(name)
        # Who wrote last may have a transaction open: what it ends as is known only once it is fenced.
        await self._commits.fence(name)
        owned = await self._begin(partition, await self._progress(name), topic_id)
        await self._commits.claim(name, owned.tracker.commit_point())
        owned.tracker.committed()
        self._admit(owned)

    async def _begin(self, partition: ClientPartition, point: OffsetAndMetadata, topic_id: str) -> OwnedPartition:
        name, chunks = TopicPartition(*partition), self._reading.partition(TopicPartition(*partition))
        progress = decode(point.metadata)
        # The broker forgets the commits of a topic that is deleted; readers of its chunks do not forget their epoch.
        epoch = max(progress.epoch, self._partitions.retired_epoch(name)) + 1
        if is_another(progress.topic_id, topic_id):
            _log.warning("progress of a topic that was deleted is passed over", topic=name.topic, partition=name.partition)
            point, progress = OffsetAndMetadata(-1, ""), Progress()
        begin = (await self._consumer.beginning_offsets([partition]))[partition]
        results = ClientPartition(*self._result_keys.partition(name))
        ends = await self._consumer.end_offsets([partition, chunks, results])
        low, done = _bounded(
            partition, point.offset, progress, begin, ends[partition], is_same=topic_id == progress.topic_id != ""
        )
        tracker = PartitionTracker(
            low=low, epoch=epoch, done=done, window=self._window, chunk_end=ends[chunks], topic_id=topic_id
        )
        said, chunk_end = await self._reading.unfinished(
            name, tracker.is_done, begin=progress.chunk_low if progress.chunk_low >= 0 else ends[chunks], end=ends[chunks]
        )
        tracker.chunks_written(chunk_end)
        for offset, was in said.items():
            tracker.has_chunks(offset, was.first_offset)
        keys = await self._keys(name, progress.result_low, ends[results])
        tracker.result_low = lambda: keys.low
        return OwnedPartition(name, tracker, redelivered_below=min(progress.next_offset, ends[partition]), said=said, keys=keys)

    async def _keys(self, name: TopicPartition, result_low: int, end: int) -> IdempotencyWindow:
        """`end`: of the committed results."""
        if result_low >= 0:
            # The end of all records: another class's open transaction may hide ours behind it for a while.
            end = await self._reading.end(self._result_keys.partition(name))
        keys = IdempotencyWindow(end=end, wall_ms=lambda: self._wall_ns() // 1_000_000)
        if result_low >= 0:
            await self._result_keys.restore(keys, name, begin=result_low, end=end)
        return keys

    def _admit(self, owned: OwnedPartition) -> None:
        partition = ClientPartition(*owned.partition)
        self._consumer.seek(partition, owned.tracker.next_offset)
        if self._partitions.get(owned.partition) is not owned:
            self._partitions.put(owned)
        owned.open()
        self._consumer.resume(partition)
        self._commits.opened(owned)


def _bounded(
    partition: ClientPartition, low: int, progress: Progress, begin: int, end: int, *, is_same: bool
) -> tuple[int, int]:
    """The committed offset and done-bits as the log holds them. `is_same`: the topic is known to be the one of the commit."""
    if low > end:
        why = "its end is lost (an unclean election)" if is_same else "the topic was made anew"
        _log.warning("the log ends before the committed offset", reason=why, topic=partition.topic, committed=low, end=end)
        return (end if is_same else begin), 0
    if low < begin:
        # Retention has removed what lies before: gone by configuration, or there never was a commit.
        return begin, progress.done >> (begin - low) if low >= 0 else 0
    return low, progress.done
