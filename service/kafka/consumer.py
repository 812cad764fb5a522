"""The one consumer of this process: takes prompt records partition by partition, in weighted turns, within the intake's budget.

Guarantees: no record is taken from a partition before its committed progress was read and this owner's epoch was committed; a
record that is done is skipped; a partition whose window is full, whose class is over budget, or whose next record cannot be read
is paused while the others go on, and polling never stops, so that the group keeps this member. Both rebalance callbacks return at
once (a second at most). A topic of a class that appears later is read from then on; what runs meanwhile goes on. What runs of one
that is deleted goes on to its result; made anew, it is another topic, and is read from its start once that has ended.
The broker may be away at start or later: `run` begins anew with back-off, and running generations go on meanwhile.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener
from aiokafka import TopicPartition as ClientPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaConnectionError, KafkaError
from aiokafka.structs import OffsetAndMetadata

from service.cancellation import end_tasks
from service.config import KafkaSection
from service.errors import SetupError
from service.kafka import membership
from service.kafka.assignment import Assignment
from service.kafka.backlog import Backlog
from service.kafka.budget import IntakeBudget, estimate
from service.kafka.clients import stop_in_order
from service.kafka.completion import Commits
from service.kafka.handler import PromptHandler
from service.kafka.intake import Intake
from service.kafka.lag import Lag
from service.kafka.ownership import OwnedPartition, Partitions
from service.kafka.prompt_topics import is_another
from service.kafka.records import InRecord, TopicPartition
from service.kafka.result_keys import ResultKeys
from service.kafka.resume import ChunkReading
from service.kafka.topic_watch import TopicWatch
from service.kafka.topics import Topics
from service.kafka.unreadable import UNREADABLE, Unreadable
from service.telemetry.metrics import KafkaMetrics

_log = structlog.get_logger(__name__)

_IDLE_POLL_MS = 200
"""A record that comes ends the wait."""
_HELD_POLL_MS = 50
"""While some may not be read: nothing tells when they may again."""
_WATCH_S = 2.0
_BACKOFF_MIN_S, _BACKOFF_MAX_S = 0.5, 10.0
_REVOKE_COMMIT_S = 1.0
# `getmany` without partitions means all of them: polling this one keeps the membership alive and takes nothing.
_NOWHERE = ClientPartition("", -1)


class PromptConsumer(ConsumerRebalanceListener):
    """Takes records and hands them to the handler; `run` is its task."""

    def __init__(
        self,
        *,
        section: KafkaSection,
        topics: Topics,
        partitions: Partitions,
        budget: IntakeBudget,
        metrics: KafkaMetrics,
        make_consumer: Callable[[], AIOKafkaConsumer],
        make_admin: Callable[[], AIOKafkaAdminClient],
        prepare: Callable[[AIOKafkaAdminClient], Awaitable[Sequence[str]]],
        explain: Callable[[], Awaitable[str]],
        reading: ChunkReading,
        result_keys: ResultKeys,
        wall_ns: Callable[[], int],
        engine_alive: Callable[[], bool],
        on_state: Callable[[bool, str], None],
        on_deleted: Callable[[str], None],
    ) -> None:
        """`prepare` looks at the topics, gives those to read and calls `attach`; `explain` says why no broker lets us in.

        `on_state` hears whether the broker is served, and why not; `on_deleted` of topics that are there no longer.
        """
        self._section = section
        self._partitions, self._budget, self._metrics = partitions, budget, metrics
        self._make_consumer, self._make_admin, self._prepare = make_consumer, make_admin, prepare
        self._explain, self._reading, self._result_keys = explain, reading, result_keys
        self._wall_ns = wall_ns
        self._backlog = Backlog()
        self._on_state, self._on_deleted = on_state, on_deleted
        self._watch_topics = TopicWatch(topics, lambda: self._admin, partitions, refresh_s=section.topic_refresh_ms / 1_000)
        self._commits: Commits | None = None
        self._handler: PromptHandler | None = None
        self._consumer: AIOKafkaConsumer | None = None
        self._admin: AIOKafkaAdminClient | None = None
        self._opening: dict[TopicPartition, asyncio.Task[None]] = {}
        self._committing: asyncio.Task[None] | None = None
        self._unreadable = Unreadable()
        self._intake = Intake(
            partitions=partitions, budget=budget, classes=topics.classes, unreadable=self._unreadable, engine_alive=engine_alive,
            metrics=metrics,
        )  # fmt: skip
        self._joined = False

    def attach(self, commits: Commits, handler: PromptHandler) -> None:
        """The two that need this consumer's `commit` to be made themselves."""
        self._commits, self._handler = commits, handler

    @property
    def paused(self) -> frozenset[TopicPartition]:
        """Open partitions that are held back now."""
        return frozenset(self._intake.paused)

    async def run(self) -> None:
        """Serves until cancelled; never ends by itself."""
        backoff_s = _BACKOFF_MIN_S
        while True:
            self._joined = False
            try:
                await self._session()
            except (KafkaError, IllegalStateError, SetupError, OSError, TimeoutError) as error:
                reason = str(error) if isinstance(error, SetupError) else f"{type(error).__name__}: {error}"
                _log.warning("the broker is not served", reason=reason)
                self._report(False, reason)
            finally:
                await self._end_session()
            backoff_s = _BACKOFF_MIN_S if self._joined else min(backoff_s * 2, _BACKOFF_MAX_S)
            await asyncio.sleep(backoff_s)

    def stop_polling(self) -> None:
        """Takes no further record; membership and commits go on until `run` is cancelled."""
        self._intake.polling = False

    async def commit(self, points: Mapping[TopicPartition, tuple[int, str]]) -> None:
        """`Offsets` for the committer."""
        if self._consumer is None:
            raise KafkaConnectionError("there is no connection to the group now")
        asked = {ClientPartition(*partition): point for partition, point in points.items()}
        self._committing = task = asyncio.create_task(self._consumer.commit(asked), name="commit offsets")
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
        if task.cancelled():
            raise CommitFailedError("a rebalance has begun")
        task.result()

    async def progress(self, partition: TopicPartition) -> OffsetAndMetadata:
        """What is committed for a partition. Raises `KafkaError`, `TimeoutError`."""
        if self._admin is None:
            raise KafkaConnectionError("there is no connection to the group now")
        return await membership.progress(self._admin, self._section.group_id, partition)

    async def in_good_standing(self) -> bool:
        """Whether the group answers, now, that this replica is a member."""
        return self._consumer is not None and await membership.in_good_standing(self._consumer)

    def reopen(self, partition: TopicPartition) -> None:
        """Another owner had `partition` meanwhile: it begins anew, if it is still assigned."""
        owned = self._partitions.get(partition)
        if owned is not None and owned.state == "open" and self._consumer is not None:
            self._lose(owned)
            self._begin_anew(owned)

    def _begin_anew(self, owned: OwnedPartition) -> None:
        assert self._consumer is not None
        self._consumer.pause(ClientPartition(*owned.partition))
        if (opening := self._opening.get(owned.partition)) is None or opening.done():
            self._open(self._consumer, owned.partition)

    def retire(self, owned: OwnedPartition) -> None:
        """The topic of `owned` is there no longer; another of its name may be, and is read once what runs has ended."""
        if owned.state in ("lost", "retired"):
            return
        topic, number = owned.partition
        self._partitions.retire(owned.partition)
        self._forget(owned.partition)
        self._on_deleted(topic)
        self._metrics.retired()
        _log.warning("a topic was deleted; what runs of it goes on", topic=topic, partition=number, running=owned.num_running)
        if self._consumer is not None and ClientPartition(topic, number) in self._consumer.assignment():
            self._begin_anew(owned)

    async def on_partitions_revoked(self, revoked: "set[ClientPartition]") -> None:
        """Tentative: what runs goes on; what is done is committed while this member still may."""
        await self._step_back()

    async def on_partitions_assigned(self, assigned: "set[ClientPartition]") -> None:
        """Lost partitions end; each assigned one stays closed until a task of its own has read its progress."""
        consumer = self._consumer
        if consumer is None or self._commits is None:
            return
        self._metrics.rebalanced()
        wanted = {TopicPartition(*partition) for partition in assigned}
        named = {partition.topic for partition in wanted}
        left = [owned for owned in self._partitions if owned.partition not in wanted]
        for owned in left:
            if owned.partition.topic in named:
                self._lose(owned)
        if assigned:
            consumer.pause(*assigned)
        self._cancel_opening()
        for owned in left:
            if owned.state != "lost":
                # None of its topic is ours: others have them all, or it was deleted. It stays tentative until that is known.
                self._start(owned.partition, self._settle(owned))
        for partition in sorted(wanted):
            self._open(consumer, partition)
        self._joined = True
        self._report(True, self._unreadable.reason)

    def _open(self, consumer: AIOKafkaConsumer, partition: TopicPartition) -> None:
        assert self._commits is not None
        assignment = Assignment(
            consumer=consumer, progress=self.progress, partitions=self._partitions, commits=self._commits,
            reading=self._reading, result_keys=self._result_keys, window=self._section.window_offsets, wall_ns=self._wall_ns,
            topic_id=self._watch_topics.topic_id, retire=self.retire,
        )  # fmt: skip
        self._start(partition, assignment.open(partition))

    def _start(self, partition: TopicPartition, work: Coroutine[Any, Any, None]) -> None:
        self._opening[partition] = asyncio.create_task(work, name=f"open {partition.topic}-{partition.partition}")

    async def _settle(self, owned: OwnedPartition) -> None:
        if await self._watch_topics.is_deleted(owned):
            self.retire(owned)
        else:
            self._lose(owned)

    def _lose(self, owned: OwnedPartition) -> None:
        self._partitions.lose(owned.partition)
        self._forget(owned.partition)

    def _forget(self, partition: TopicPartition) -> None:
        self._intake.paused.discard(partition)
        self._backlog.forget(partition)
        self._metrics.forget(*partition)

    async def _step_back(self) -> None:
        self._cancel_opening()
        some_open = any(owned.state == "open" for owned in self._partitions)
        if some_open and self._commits is not None and not await self._commits.flush(_REVOKE_COMMIT_S):
            _log.info("the commit before a rebalance took too long")
        if self._committing is not None:
            # The client would try again under the next generation, when the partition may have another owner.
            self._committing.cancel()
        self._revoke_all()

    def _revoke_all(self) -> None:
        self._partitions.revoke_all()
        self._intake.paused.clear()
        self._unreadable.forget()

    def _cancel_opening(self) -> None:
        for task in self._opening.values():
            task.cancel()
        self._opening.clear()

    async def _session(self) -> None:
        """One connection's life. Raises what ended it."""
        self._admin = admin = self._make_admin()
        try:
            await admin.start()
        except KafkaConnectionError as error:
            raise SetupError(await self._explain() or str(error), exit_code=3) from error
        names = tuple(await self._prepare(admin))
        self._consumer = consumer = self._make_consumer()
        consumer.subscribe(topics=names, listener=self)
        await consumer.start()
        change = functools.partial(self._change_topics, consumer)
        following = self._watch_topics.follow(dict.fromkeys(names, ""), change)
        tasks = {asyncio.create_task(part) for part in (self._poll(consumer), self._watch(consumer), following)}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await end_tasks(tasks)

    async def _end_session(self) -> None:
        """Leaves the group. Partitions stay tentative: the next session's assignment says whose they are."""
        self._cancel_opening()
        self._revoke_all()
        consumer, self._consumer = self._consumer, None
        admin, self._admin = self._admin, None
        await stop_in_order(consumer and consumer.stop, admin and admin.close)

    async def _watch(self, consumer: AIOKafkaConsumer) -> None:
        """Measures lag every now and then, and says whether the broker answers."""
        lag = Lag(self._partitions, self._backlog, self._metrics, wall_ns=self._wall_ns)
        while True:
            answers = await lag.measure(consumer)
            if answers is not None:
                self._report(answers, self._unreadable.reason if answers else "the broker does not answer")
            await asyncio.sleep(_WATCH_S)

    async def _change_topics(self, consumer: AIOKafkaConsumer, found: Mapping[str, str]) -> None:
        """Reads topics of classes that came, and no longer those that went. `found`: their identities."""
        for owned in self._partitions:
            topic = owned.partition.topic
            if topic not in found or is_another(owned.tracker.topic_id, found[topic]):
                self.retire(owned)
        # From here until the group has answered nothing is assigned, and the client takes no commit.
        await self._step_back()
        consumer.subscribe(topics=tuple(found), listener=self)

    async def _poll(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            readable = self._intake.readable(consumer)
            taken = 0
            for partition in readable:
                taken += await self._turn(consumer, partition, timeout_ms=0)
            if not taken:
                # Nothing was there: wait on all that may be read at once, or (nothing may be) just be seen polling.
                suspect = self._unreadable.suspect(readable)
                waiting = dict.fromkeys(readable) if suspect is None else (suspect,)
                held = len(set(readable)) < sum(1 for _ in self._partitions)
                await self._turn(consumer, *waiting, timeout_ms=_HELD_POLL_MS if held or not readable else _IDLE_POLL_MS)
            await asyncio.sleep(0)

    async def _turn(self, consumer: AIOKafkaConsumer, *partitions: TopicPartition, timeout_ms: int) -> int:
        asked = [ClientPartition(*partition) for partition in partitions] or [_NOWHERE]
        limit = self._unreadable.limit(partitions, self._section.max_poll_records)
        try:
            found = await consumer.getmany(*asked, timeout_ms=timeout_ms, max_records=limit)
        except UNREADABLE as error:
            self._not_read(consumer, partitions, error)
            return 0
        if found and len(partitions) == 1:
            self._unreadable.read(partitions[0])
        return sum(self._take(consumer, TopicPartition(*partition), records) for partition, records in found.items())

    def _not_read(self, consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition], error: Exception) -> None:
        """What was unpacked before the error is gone from the client, of every partition in the poll: it is fetched again."""
        offset = 0
        for partition in partitions:
            owned = self._partitions.get(partition)
            if owned is not None and owned.state == "open":
                offset = owned.tracker.next_offset
                consumer.seek(ClientPartition(*partition), offset)
        if self._unreadable.failed(partitions, offset, error):
            _log.error("records cannot be read; their partition is held back", reason=self._unreadable.reason)
            self._report(True, self._unreadable.reason)

    def _take(self, consumer: AIOKafkaConsumer, partition: TopicPartition, records: Sequence[InRecord]) -> int:
        """Hands records to the handler until one may not be taken now; that one and the rest are fetched again later."""
        owned = self._partitions.get(partition)
        if owned is not None and owned.state == "open" and records[0].offset < owned.tracker.next_offset:
            # The log ended before our place in it, and the client went to its start: it was cut, or is another's.
            owned.revoke()
            self._begin_anew(owned)
        for index, record in enumerate(records):
            if owned is None or owned.state != "open":
                # A rebalance began while the records came; whoever opens the partition starts from its progress.
                return index
            if not self._intake.may_take(owned, record):
                owned.tracker.skip_to(record.offset)
                self._backlog.refused(partition, record.offset, record.timestamp)
                consumer.seek(ClientPartition(*partition), record.offset)
                self._metrics.records(partition.topic, index)
                return index
            if owned.tracker.take(record.offset):
                self._run(owned, record)
            else:
                self._metrics.redelivered("skipped")
        self._metrics.records(partition.topic, len(records))
        return len(records)

    def _run(self, owned: OwnedPartition, record: InRecord) -> None:
        assert self._handler is not None
        cost = estimate(record.value, sum(len(value or b"") for _, value in record.headers))
        said = owned.said.pop(record.offset, None)
        if said is not None or record.offset < owned.redelivered_below:
            self._metrics.redelivered("resumed" if said is not None and said.num_tokens else "repeated")
        self._budget.hold(cost)
        self._backlog.took(owned.partition, record.offset, record.timestamp)

        def release() -> None:
            self._budget.release(cost)
            if owned.state != "retired":
                self._backlog.ended(owned.partition, record.offset)

        owned.run(record.offset, self._handler.handle(record, owned, said, release=release))

    def _report(self, served: bool, reason: str) -> None:
        self._metrics.connected(served)
        self._on_state(served, reason)
