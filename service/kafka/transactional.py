"""Exactly once: terminal records, dead letters and `(low, done-bits)` of an input partition in one short transaction.

Guarantees: a completion is settled as durable only when its transaction is known to have landed, and an offset is done in the same
transaction as its records; a transaction whose end is not known is never repeated before the broker has told whether it landed.
A record that the broker refuses for a reason of its own is found and replaced or set aside; its neighbours are written without it.
One lane a partition, one transaction a lane at a time, begun at once when idle and `interval_s` after the last one began else.
A lane fences anew only while its partition is open and the group has answered this member after the failure: else two replicas that
both believe to be the owner would fence each other for ever.
Of a topic that was deleted no progress can be committed, so no transaction lands: what still ends is written without one, by
`without_progress`, and what a transaction under way becomes is not known then.
Bounded by the intake: a record's tokens are released only once it is durable.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import structlog
from aiokafka.errors import CommitFailedError, KafkaConnectionError, KafkaError
from aiokafka.structs import OffsetAndMetadata

from service.kafka.committer import Committer
from service.kafka.completion import Completion
from service.kafka.ownership import OwnedPartition
from service.kafka.records import OutRecord, TopicPartition
from service.kafka.tracker import decode
from service.kafka.transactions import LostError, RefusedError, Transactions
from service.telemetry.metrics import KafkaMetrics

_log = structlog.get_logger(__name__)

_RETRY_S, _RETRY_MAX_S = 0.1, 2.0
_ASIDE_S = 5.0
_MAX_COMPLETIONS, _MAX_BYTES = 1_000, 4_000_000
"""Of one transaction: it stays short, and well below its time-out."""


class Group(Protocol):
    """What a lane asks of the group's member (`consumer.PromptConsumer`)."""

    async def progress(self, partition: TopicPartition) -> OffsetAndMetadata:
        """What is committed for a partition. Raises `KafkaError`, `TimeoutError`."""
        ...

    async def in_good_standing(self) -> bool:
        """Whether the group has just answered that this replica is a member."""
        ...

    def reopen(self, partition: TopicPartition) -> None:
        """The partition had another owner meanwhile: begin it anew."""
        ...

    def retire(self, owned: OwnedPartition) -> None:
        """Its topic was deleted."""
        ...


class TransactionalCommitter:
    """`Commits` with one transactional producer an input partition."""

    def __init__(
        self,
        make: Callable[[TopicPartition], Transactions],
        group: Group,
        *,
        without_progress: Committer,
        interval_s: float,
        metrics: KafkaMetrics,
        on_commit: Callable[[tuple[Completion, ...], bool], None] = lambda batch, ok: None,
    ) -> None:
        """`make` gives the transactions of a partition. `on_commit` hears of each transaction, and whether it landed."""
        self._make, self._group = make, group
        self._without_progress = without_progress
        self._interval_s = interval_s
        self._metrics = metrics
        self._on_commit = on_commit
        self._fenced: dict[TopicPartition, Transactions] = {}
        self._lanes: dict[OwnedPartition, _Lane] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def fence(self, partition: TopicPartition) -> None:
        if (unused := self._fenced.pop(partition, None)) is not None:
            await unused.close()
        transactions = self._fenced[partition] = self._make(partition)
        await transactions.fence()

    async def claim(self, partition: TopicPartition, point: tuple[int, str]) -> None:
        if not await self._group.in_good_standing():
            raise CommitFailedError("the group does not know this member now")
        try:
            # Not a plain commit: an earlier owner that was halted may wake and fence, read the epoch that is still its own, and commit.
            # The group would let our older progress overwrite that; our producer, fenced by then, does not.
            await self._fenced[partition].commit(partition, (), point)
        except (LostError, RefusedError) as error:
            raise KafkaConnectionError(f"the first progress was not committed: {error}") from error

    def opened(self, owned: OwnedPartition) -> None:
        if owned in self._lanes:
            return
        transactions = self._fenced.pop(owned.partition, None) or self._make(owned.partition)
        lane = _Lane(owned, transactions, self._group, self._interval_s, self._metrics, self._on_commit)
        self._lanes[owned] = lane
        task = asyncio.create_task(lane.run(), name=f"commit {owned.partition.topic}-{owned.partition.partition}")
        owned.keep(task)
        owned.at_retirement(lane.wake)
        self._tasks.add(task)

        def ended(done: asyncio.Task[None]) -> None:
            # Here and not in the task, which may be cancelled before it has begun.
            self._tasks.discard(done)
            self._lanes.pop(owned, None)
            if owned.state == "retired":
                for completion in lane.give_up():
                    self._without_progress.submit(completion)
            else:
                lane.abandon()
            closing = asyncio.ensure_future(transactions.close())
            self._tasks.add(closing)
            closing.add_done_callback(self._tasks.discard)
            if not done.cancelled() and (error := done.exception()) is not None:
                done.get_loop().call_exception_handler({"message": "a lane failed", "exception": error, "task": done})

        task.add_done_callback(ended)

    def submit(self, completion: Completion) -> None:
        lane = self._lanes.get(completion.owned)
        if completion.owned.state == "retired":
            self._without_progress.submit(completion)
        elif lane is None:
            # Lost before it was done.
            completion.settled(False)
        else:
            lane.submit(completion)

    async def flush(self, timeout_s: float) -> bool:
        lanes = tuple(self._lanes.values())
        waits: list[asyncio.Future[bool]] = [asyncio.ensure_future(lane.idle.wait()) for lane in lanes]
        waits.append(asyncio.ensure_future(self._without_progress.flush(timeout_s)))
        _, late = await asyncio.wait(waits, timeout=timeout_s)
        for wait in late:
            wait.cancel()
        return not late and all(wait.result() for wait in waits)

    async def run(self) -> None:
        try:
            await self._without_progress.run()
        finally:
            for owned in tuple(self._lanes):
                owned.lose()
            while self._tasks:
                await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.gather(*(unused.close() for unused in self._fenced.values()))


class _Lane:
    """The completions of one owned partition, on their way into transactions."""

    def __init__(
        self,
        owned: OwnedPartition,
        transactions: Transactions,
        group: Group,
        interval_s: float,
        metrics: KafkaMetrics,
        on_commit: Callable[[tuple[Completion, ...], bool], None],
    ) -> None:
        self._owned = owned
        self._transactions = transactions
        self._group = group
        self._interval_s = interval_s
        self._metrics = metrics
        self._on_commit = on_commit
        self._queue: deque[Completion] = deque()
        self._unsettled: dict[int, Completion] = {}
        self._wake = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()

    def submit(self, completion: Completion) -> None:
        self._unsettled[completion.offset] = completion
        self.idle.clear()
        self._enqueue(completion)

    def _enqueue(self, completion: Completion) -> None:
        self._queue.append(completion)
        self.wake()

    def wake(self) -> None:
        """There is something to write, or the partition's state has changed."""
        self._wake.set()

    async def run(self) -> None:
        """Until the partition is lost or retired, or cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._owned.state == "retired":
                return
            while self._queue:
                began_s = loop.time()
                if not (await self._owned.may_write() and await self._commit(self._next())) or self._owned.state == "retired":
                    return
                await asyncio.sleep(max(0.0, began_s + self._interval_s - loop.time()))

    def abandon(self) -> None:
        """Another owner's, or nobody's: what is left is settled as lost."""
        for completion in self.give_up():
            completion.settled(False)

    def give_up(self) -> tuple[Completion, ...]:
        """What is left, for whoever settles it."""
        left = tuple(self._unsettled.values())
        self._unsettled.clear()
        self._queue.clear()
        self.idle.set()
        return left

    def _next(self) -> tuple[Completion, ...]:
        num_bytes = 0
        batch: list[Completion] = []
        while self._queue and len(batch) < _MAX_COMPLETIONS and num_bytes < _MAX_BYTES:
            completion = self._queue.popleft()
            num_bytes += sum(record.num_bytes for record in completion.records)
            batch.append(completion)
        return tuple(batch)

    async def _commit(self, batch: tuple[Completion, ...]) -> bool:
        """True once each of `batch` is durable or set aside; False when the partition is this replica's no longer."""
        offsets: Sequence[int] = ()
        while batch:
            number = self._owned.tracker.commits + 1
            try:
                offsets = await self._transact(batch)
            except RefusedError as error:
                self._on_commit(batch, False)
                if await self._recovered(number) is None:
                    return False
                if len(batch) > 1:
                    # Which one it was, halving finds out; the others land on the way.
                    middle = len(batch) // 2
                    return await self._commit(batch[:middle]) and await self._commit(batch[middle:])
                batch = self._replaced(batch[0], error)
            except LostError as error:
                _log.info("a transaction was lost", partition=self._name, error=str(error), fenced=error.fenced)
                self._on_commit(batch, False)
                if error.fenced:
                    self._metrics.fenced()
                landed = await self._recovered(number)
                if landed is None:
                    return False
                if landed:
                    offsets = ()
                    break
            else:
                break
        self._landed(batch, offsets)
        return True

    async def _transact(self, batch: tuple[Completion, ...]) -> Sequence[int]:
        if not self._transactions.usable:
            raise LostError("there is no producer now")
        records: list[OutRecord] = []
        for completion in batch:
            records += completion.records
        point = self._owned.tracker.commit_point(*(completion.offset for completion in batch))
        return await self._transactions.commit(self._owned.partition, records, point)

    def _landed(self, batch: tuple[Completion, ...], offsets: Sequence[int]) -> None:
        if not batch:
            return
        self._owned.tracker.committed()
        for completion in batch:
            self._owned.tracker.complete(completion.offset)
        begin = 0
        for completion in batch:
            del self._unsettled[completion.offset]
            end = begin + len(completion.records)
            completion.written((offsets or ())[begin:end])
            completion.settled(True)
            begin = end
        if not self._unsettled:
            self.idle.set()
        self._on_commit(batch, True)

    def _replaced(self, completion: Completion, error: RefusedError) -> tuple[Completion, ...]:
        """What to write in place of a completion that was refused alone; nothing now when there is nothing smaller."""
        taken = completion.records[: error.num_taken]
        smaller = (*taken, *completion.replacement(error.num_taken)) if error.too_large else completion.records
        replaced = replace(completion, records=smaller)
        if smaller != completion.records:
            return (replaced,)
        _log.error("a terminal record cannot be written", partition=self._name, offset=completion.offset, error=str(error))
        asyncio.get_running_loop().call_later(_ASIDE_S, self._again, replaced)
        return ()

    def _again(self, completion: Completion) -> None:
        if completion.offset in self._unsettled:
            self._enqueue(completion)

    async def _recovered(self, number: int) -> bool | None:
        """Whether commit `number` landed, with a new producer for the next one; None when the partition is another's."""
        pause_s = _RETRY_S
        while await self._owned.may_write() and self._owned.state != "retired":
            if await self._group.in_good_standing():
                try:
                    await self._transactions.fence()
                    point = await self._group.progress(self._owned.partition)
                except (KafkaError, OSError, TimeoutError) as error:
                    _log.info("a partition waits for the broker", partition=self._name, error=type(error).__name__)
                else:
                    if point.offset < 0:
                        # There was a commit: this owner's first. The broker forgets those of a topic that is deleted.
                        self._group.retire(self._owned)
                        return None
                    progress = decode(point.metadata)
                    if progress.epoch == self._owned.epoch and number - 1 <= progress.commits <= number:
                        return progress.commits == number
                    _log.warning("a partition had another owner meanwhile", partition=self._name, epoch=progress.epoch)
                    self._group.reopen(self._owned.partition)
                    return None
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _RETRY_MAX_S)
        return None

    @property
    def _name(self) -> str:
        return f"{self._owned.partition.topic}-{self._owned.partition.partition}"
