"""The one consumer of this process: takes prompt records partition by partition, in weighted turns, within the intake's budget.

Guarantees: no record is taken from a partition before its committed progress was read and this owner's epoch was committed; a
record that is done is skipped; a partition whose window is full, whose class is over budget, or whose next record cannot be read
is paused while the others go on, and polling never stops, so that the group keeps this member. Both rebalance callbacks return at
once (a second at most). A topic of a class that appears later is read from then on; what runs meanwhile goes on.
The broker may be away at start or later: `run` begins anew with back-off, and running generations go on meanwhile.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

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
from service.kafka.completion import Commits
from service.kafka.handler import PromptHandler
from service.kafka.lag import Lag
from service.kafka.ownership import OwnedPartition, Partitions
from service.kafka.prompt_topics import PromptTopics
from service.kafka.records import InRecord, TopicPartition
from service.kafka.result_keys import ResultKeys
from service.kafka.resume import ChunkReading
from service.kafka.topics import WEIGHTS, Topics, turns
from service.kafka.unreadable import UNREADABLE, Unreadable
from service.telemetry.metrics import KafkaMetrics

_log = structlog.get_logger(__name__)

_IDLE_POLL_MS = 200
"""A record that comes ends the wait."""
_HELD_POLL_MS = 50
"""While some may not be read: nothing tells when they may again."""
_WATCH_S = 2.0
_LOOK_S = 5.0
_BACKOFF_MIN_S, _BACKOFF_MAX_S = 0.5, 10.0
_REVOKE_COMMIT_S = 1.0
_STOP_S = 5.0
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
    ) -> None:
        """`prepare` looks at the topics, gives those to read and calls `attach`; `explain` says why no broker lets us in.

        `on_state` hears whether the broker is served, and why not.
        """
        self._section, self._topics, self._classes = section, topics, topics.classes
        self._partitions, self._budget, self._metrics = partitions, budget, metrics
        self._make_consumer, self._make_admin, self._prepare = make_consumer, make_admin, prepare
        self._explain, self._reading, self._result_keys = explain, reading, result_keys
        self._wall_ns = wall_ns
        self._backlog = Backlog()
        self._engine_alive, self._on_state = engine_alive, on_state
        self._commits: Commits | None = None
        self._handler: PromptHandler | None = None
        self._consumer: AIOKafkaConsumer | None = None
        self._admin: AIOKafkaAdminClient | None = None
        self._opening: dict[TopicPartition, asyncio.Task[None]] = {}
        self._committing: asyncio.Task[None] | None = None
        self._paused: set[TopicPartition] = set()
        self._unreadable = Unreadable()
        self._polling = True
        self._joined = False

    def attach(self, commits: Commits, handler: PromptHandler) -> None:
        """The two that need this consumer's `commit` to be made themselves."""
        self._commits, self._handler = commits, handler

    @property
    def paused(self) -> frozenset[TopicPartition]:
        """Open partitions that are held back now."""
        return frozenset(self._paused)

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
        self._polling = False

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
            self._consumer.pause(ClientPartition(*partition))
            self._open(self._consumer, partition)

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
        for owned in self._partitions:
            if owned.partition not in wanted:
                self._lose(owned)
        if assigned:
            consumer.pause(*assigned)
        self._cancel_opening()
        for partition in sorted(wanted):
            self._open(consumer, partition)
        self._joined = True
        self._report(True, self._unreadable.reason)

    def _open(self, consumer: AIOKafkaConsumer, partition: TopicPartition) -> None:
        assert self._commits is not None
        assignment = Assignment(
            consumer=consumer, progress=self.progress, partitions=self._partitions, commits=self._commits,
            reading=self._reading, result_keys=self._result_keys, window=self._section.window_offsets, wall_ns=self._wall_ns,
        )  # fmt: skip
        name = f"open {partition.topic}-{partition.partition}"
        self._opening[partition] = asyncio.create_task(assignment.open(partition), name=name)

    def _lose(self, owned: OwnedPartition) -> None:
        self._partitions.lose(owned.partition)
        self._paused.discard(owned.partition)
        self._backlog.forget(owned.partition)
        self._metrics.forget(*owned.partition)

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
        self._paused.clear()
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
        names = frozenset(await self._prepare(admin))
        self._consumer = consumer = self._make_consumer()
        consumer.subscribe(topics=tuple(names), listener=self)
        await consumer.start()
        parts = (self._poll(consumer), self._watch(consumer), self._follow_topics(consumer, admin, names))
        tasks = {asyncio.create_task(part) for part in parts}
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
        for client, stop in ((consumer, "stop"), (admin, "close")):
            if client is None:
                continue
            try:
                async with asyncio.timeout(_STOP_S):
                    await getattr(client, stop)()
            except (KafkaError, OSError, TimeoutError) as error:
                _log.info("a Kafka client did not stop in order", error=type(error).__name__)

    async def _watch(self, consumer: AIOKafkaConsumer) -> None:
        """Measures lag every now and then, and says whether the broker answers."""
        lag = Lag(self._partitions, self._backlog, self._metrics, wall_ns=self._wall_ns)
        while True:
            answers = await lag.measure(consumer)
            if answers is not None:
                self._report(answers, self._unreadable.reason if answers else "the broker does not answer")
            await asyncio.sleep(_WATCH_S)

    async def _follow_topics(self, consumer: AIOKafkaConsumer, admin: AIOKafkaAdminClient, names: frozenset[str]) -> None:
        """Reads topics of classes that come, and no longer those that go."""
        topics = PromptTopics(self._topics, names)
        while True:
            await asyncio.sleep(self._section.topic_refresh_ms / 1_000)
            try:
                async with asyncio.timeout(_LOOK_S):
                    found = await topics.changed(admin)
            except (KafkaError, TimeoutError) as error:
                _log.info("the topics could not be looked at", error=type(error).__name__)
                continue
            if found is not None:
                _log.info("the topics of prompts have changed", topics=sorted(found))
                # From here until the group has answered nothing is assigned, and the client takes no commit.
                await self._step_back()
                consumer.subscribe(topics=tuple(found), listener=self)

    async def _poll(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            readable = self._readable(consumer)
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

    def _readable(self, consumer: AIOKafkaConsumer) -> list[TopicPartition]:
        """The open partitions that may be read now, in the order of their turns; pauses and resumes by the way."""
        readable = []
        for owned in self._partitions:
            if owned.state != "open":
                continue
            if self._may_read(owned):
                readable.append(owned.partition)
                if owned.partition in self._paused:
                    self._paused.discard(owned.partition)
                    consumer.resume(ClientPartition(*owned.partition))
            elif owned.partition not in self._paused:
                self._paused.add(owned.partition)
                consumer.pause(ClientPartition(*owned.partition))
            self._metrics.window(*owned.partition, owned.tracker.used)
        self._metrics.intake(tokens=self._budget.used, paused_partitions=len(self._paused))
        return turns({partition: WEIGHTS[self._classes[partition.topic]] for partition in readable})

    def _may_read(self, owned: OwnedPartition) -> bool:
        if not self._polling or not self._engine_alive() or not self._budget.open(self._classes[owned.partition.topic]):
            return False
        if self._unreadable.holds(owned.partition):
            return False
        if owned.partition in self._paused:
            return owned.tracker.used <= owned.tracker.window // 2
        return not owned.tracker.full

    def _take(self, consumer: AIOKafkaConsumer, partition: TopicPartition, records: Sequence[InRecord]) -> int:
        """Hands records to the handler until one may not be taken now; that one and the rest are fetched again later."""
        owned = self._partitions.get(partition)
        for index, record in enumerate(records):
            if owned is None or owned.state != "open":
                # A rebalance began while the records came; whoever opens the partition starts from its progress.
                return index
            if not self._may_take(owned, record):
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

    def _may_take(self, owned: OwnedPartition, record: InRecord) -> bool:
        in_budget = self._polling and self._budget.open(self._classes[owned.partition.topic])
        return in_budget and owned.tracker.fits(record.offset)

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
            self._backlog.ended(owned.partition, record.offset)

        owned.run(record.offset, self._handler.handle(record, owned, said, release=release))

    def _report(self, served: bool, reason: str) -> None:
        self._metrics.connected(served)
        self._on_state(served, reason)
