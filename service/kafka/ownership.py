"""The partitions that this replica works on, and what a rebalance does to them.

A partition is `opening` (assigned; its progress is being read), `open` (records are taken, results written), `tentative` (revoked
for now: running generations go on, nothing is written), `lost` (another replica's: what ran is cancelled and not written) or
`retired` (its topic was deleted: what runs ends as it would have, and is written without any progress; nothing more is taken).
aiokafka revokes everything at every rebalance, so most tentative partitions open again a moment later.
Owner of the trackers and of the tasks that run a partition's records.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

from service.kafka.chunk_records import Said
from service.kafka.idempotency import IdempotencyWindow
from service.kafka.records import TopicPartition
from service.kafka.tracker import PartitionTracker

State = Literal["opening", "open", "tentative", "lost", "retired"]


class OwnedPartition:
    """One partition, from the moment that its progress was read until it is lost."""

    def __init__(
        self,
        partition: TopicPartition,
        tracker: PartitionTracker,
        *,
        redelivered_below: int = 0,
        said: Mapping[int, Said] = MappingProxyType({}),
        keys: IdempotencyWindow | None = None,
    ) -> None:
        """`redelivered_below`: offsets below it were taken by an earlier owner already. `said`: what they had said of which.

        `keys`: the idempotency keys that are known; none by default.
        """
        self.partition = partition
        self.tracker = tracker
        self.redelivered_below = redelivered_below
        self.said = dict(said)
        self.keys = IdempotencyWindow() if keys is None else keys
        self.state: State = "opening"
        self._settled = asyncio.Event()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._kept: list[asyncio.Task[None]] = []
        self._at_retirement: list[Callable[[], None]] = []

    @property
    def epoch(self) -> int:
        return self.tracker.epoch

    @property
    def num_running(self) -> int:
        """Records whose task has not ended."""
        return len(self._tasks)

    def open(self) -> None:
        """It is this replica's."""
        self.state = "open"
        self._settled.set()

    def revoke(self) -> None:
        """Its owner is being decided anew."""
        if self.state not in ("lost", "retired"):
            self.state = "tentative"
            self._settled.clear()

    def retire(self) -> None:
        """There is no partition any more: what runs here goes on."""
        self.state = "retired"
        self._settled.set()
        for hear in self._at_retirement:
            hear()

    def lose(self) -> None:
        """It is another's: everything running here is cancelled."""
        self.state = "lost"
        self._settled.set()
        for task in (*self._tasks.values(), *self._kept):
            task.cancel()

    async def may_write(self) -> bool:
        """Waits until the owner is known; whether results are this replica's to write."""
        while self.state in ("opening", "tentative"):
            await self._settled.wait()
        return self.state in ("open", "retired")

    def run(self, offset: int, work: Coroutine[Any, Any, None]) -> None:
        """Runs a taken record's work as a task of this partition."""
        task = asyncio.create_task(work, name=f"{self.partition.topic}-{self.partition.partition}-{offset}")
        self._tasks[offset] = task

        def ended(done: asyncio.Task[None]) -> None:
            self._tasks.pop(offset, None)
            if not done.cancelled() and (error := done.exception()) is not None:
                done.get_loop().call_exception_handler({"message": "a record's task failed", "exception": error, "task": done})

        task.add_done_callback(ended)

    def keep(self, task: "asyncio.Task[None]") -> None:
        """Ties a task of another's to this partition: it is cancelled once the partition is lost."""
        self._kept.append(task)

    def at_retirement(self, hear: Callable[[], None]) -> None:
        """`hear` is called once the partition is retired."""
        self._at_retirement.append(hear)

    def tasks(self) -> tuple["asyncio.Task[None]", ...]:
        """The running tasks."""
        return tuple(self._tasks.values())


class Partitions:
    """All of them, by topic and partition."""

    def __init__(self) -> None:
        self._owned: dict[TopicPartition, OwnedPartition] = {}
        self._retired: list[OwnedPartition] = []
        self._epochs: dict[TopicPartition, int] = {}

    def __iter__(self) -> Iterator[OwnedPartition]:
        return iter(tuple(self._owned.values()))

    def __len__(self) -> int:
        return len(self._owned)

    def get(self, partition: TopicPartition) -> OwnedPartition | None:
        return self._owned.get(partition)

    def put(self, owned: OwnedPartition) -> None:
        """Adds one; one of the same name is lost."""
        self.lose(owned.partition)
        self._owned[owned.partition] = owned

    def lose(self, partition: TopicPartition) -> OwnedPartition | None:
        """Drops one; what runs there is cancelled."""
        owned = self._owned.pop(partition, None)
        if owned is not None:
            owned.lose()
        return owned

    def retire(self, partition: TopicPartition) -> OwnedPartition | None:
        """Its topic is gone; what runs there is still found by `running` and `holds`."""
        owned = self._owned.pop(partition, None)
        if owned is not None:
            owned.retire()
            self._epochs[partition] = owned.epoch
            self._retired = [one for one in (*self._retired, owned) if one.num_running]
        return owned

    def retired_epoch(self, partition: TopicPartition) -> int:
        """The epoch of the last retired partition of this name, 0 when there was none: its chunks are there still."""
        return self._epochs.get(partition, 0)

    def holds(self, partition: TopicPartition) -> bool:
        """Whether something of a retired partition of this name still runs: its request ids may not be used again yet."""
        return any(owned.num_running for owned in self._retired if owned.partition == partition)

    def running(self) -> set["asyncio.Task[None]"]:
        """The tasks of every partition, retired ones too."""
        return {task for owned in (*self, *self._retired) for task in owned.tasks()}

    def revoke_all(self) -> None:
        """A rebalance has begun."""
        for owned in self._owned.values():
            owned.revoke()

    @property
    def num_running(self) -> int:
        return len(self.running())
