"""Kafka as a transport: one object that the application starts and drains.

It never keeps the rest of the service from running: with the broker away at start or later it reports itself unserved and tries
again. Delivery is exactly once where the broker can (`delivery.py`), else at least once. Constructs the parts of this package;
knows no gRPC or HTTP.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import structlog
from aiokafka.admin import AIOKafkaAdminClient
from opentelemetry.trace import SpanKind

from service.cancellation import end_tasks
from service.config import KafkaSection
from service.errors import SetupError
from service.kafka import topics as topic_tools
from service.kafka.budget import IntakeBudget
from service.kafka.chunks import ChunkWriter
from service.kafka.clients import Clients
from service.kafka.committer import Committer
from service.kafka.completion import Commits, Completion
from service.kafka.connection import Connection
from service.kafka.consumer import PromptConsumer
from service.kafka.delivery import Delivery, choose, transactional_id
from service.kafka.handler import Generates, PromptHandler
from service.kafka.output import ProducerOutput
from service.kafka.ownership import Partitions
from service.kafka.reader_fold import NumCharacters
from service.kafka.readers import Readers
from service.kafka.records import TopicPartition
from service.kafka.result_keys import ResultKeys
from service.kafka.resume import ChunkReading
from service.kafka.topic_check import check
from service.kafka.topics import Topics
from service.kafka.transactional import TransactionalCommitter
from service.kafka.transactions import Transactions
from service.telemetry import names, tracing
from service.telemetry.metrics import KafkaMetrics

_log = structlog.get_logger(__name__)

_FLUSH_S = 10.0
_MAX_LINKS = 64
"""Of a commit's span to the prompts in it; the SDK keeps 128."""

State = Literal["stopped", "connecting", "serving", "unreachable", "draining"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KafkaStatus:
    """A moment of the transport. `reason` says why it is not serving, or which partitions it serves not.

    `delivery` is empty until the broker was tried.
    """

    state: State
    reason: str = ""
    delivery: Literal["", "exactly_once", "at_least_once"] = ""
    partitions: int = 0
    running: int = 0
    intake_tokens: int = 0
    paused_partitions: int = 0


class KafkaTransport:
    """Prompts in, chunks and results out. `start` returns at once; `drain` ends it in order."""

    def __init__(
        self,
        section: KafkaSection,
        generation: Generates,
        *,
        spans: tracing.Tracing,
        metrics: KafkaMetrics,
        bootstrap: str = "",
        num_characters: NumCharacters = lambda model, token_ids: None,
        engine_alive: Callable[[], bool] = lambda: True,
        on_state: Callable[[bool, str], None] = lambda served, reason: None,
        wall_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`bootstrap`: instead of the section's (an embedded broker's own). While `engine_alive` is False no record is taken.

        `on_state` hears of every change: (True, "") while the broker is served in full, else (False, reason).
        Raises `SetupError` for security settings that cannot work.
        """
        self._section = section
        self._connection = Connection(section, bootstrap)
        self._topics = Topics(section.topic_prefix)
        self._spans = spans
        self._listener = on_state
        self._state: State = "stopped"
        self._reason = self._failure = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._partitions = Partitions()
        self._budget = IntakeBudget(
            high=section.intake_high_tokens, low=min(section.intake_low_tokens, section.intake_high_tokens)
        )
        self._clients = Clients(section, self._connection.aiokafka)
        self._output = ProducerOutput(self._clients.producer)
        self.readers = Readers(
            section, self._clients, on_cancel=generation.cancel, wall_ns=wall_ns, num_characters=num_characters
        )
        """For the other transports; `close` it after they have ended."""
        self._result_keys = ResultKeys(self.readers.log_reader, self._topics.results)
        self._metrics = metrics
        self._consumer = PromptConsumer(
            section=section,
            topics=self._topics,
            partitions=self._partitions,
            budget=self._budget,
            metrics=metrics,
            make_consumer=self._clients.consumer,
            make_admin=self._clients.admin,
            prepare=self._prepare,
            explain=self._connection.explain,
            reading=ChunkReading(self._clients.reader, self._topics.chunks),
            result_keys=self._result_keys,
            wall_ns=wall_ns,
            engine_alive=engine_alive,
            on_state=self._changed,
            on_deleted=self.readers.forget,
        )
        self._chunks = ChunkWriter(
            self._output,
            topic=self._topics.chunks,
            interval_s=section.chunk_interval_ms / 1_000,
            max_tokens=section.chunk_max_tokens,
            wall_ns=wall_ns,
            listener=self.readers.live,
        )
        self._delivery: Delivery | None = None
        self._commits: Commits | None = None
        self._generation = generation
        self._wall_ns, self._monotonic_ns = wall_ns, monotonic_ns

    async def start(self) -> None:
        """Begins to connect; whether it has is told by `status` and `on_state`."""
        self._state = "connecting"
        self._run(self._consumer.run(), "kafka consumer")
        self._run(self._chunks.run(), "kafka chunks")
        self._run(self.readers.run(), "kafka control")

    async def drain(self, grace_s: float) -> bool:
        """Stops taking prompts, lets running ones finish for `grace_s`, writes and commits, leaves the group; idempotent.

        What did not finish is given back: it comes again to another replica. True when nothing was.
        """
        if self._state == "stopped":
            return True
        self._state = "draining"
        self._consumer.stop_polling()
        running = self._partitions.running()
        late: set[asyncio.Task[None]] = set()
        if running:
            _, late = await asyncio.wait(running, timeout=grace_s or 0.0)
        await end_tasks(late)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await self._chunks.flush()
        flushed = self._commits is None or await self._commits.flush(_FLUSH_S)
        await self._stop()
        return flushed and not late

    async def close(self) -> None:
        """Ends at once; what ran is given back. Idempotent."""
        await self.drain(0.0)

    def status(self) -> KafkaStatus:
        """Now."""
        return KafkaStatus(
            state=self._state,
            delivery="" if self._delivery is None else self._delivery.mode,
            reason=self._reason,
            partitions=sum(owned.state == "open" for owned in self._partitions),
            running=self._partitions.num_running,
            intake_tokens=self._budget.used,
            paused_partitions=len(self._consumer.paused),
        )

    async def _stop(self) -> None:
        self._state = "stopped"
        tasks, self._tasks = self._tasks, set()
        await end_tasks(tasks)
        for owned in self._partitions:
            self._partitions.lose(owned.partition)
            self._metrics.forget(*owned.partition)
        await end_tasks(self._partitions.running())
        await self._output.close()

    def _run(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._part_ended)

    def _part_ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a part of the Kafka transport failed", part=task.get_name(), error=type(error).__name__)
            self._failure = f"{task.get_name()} failed ({type(error).__name__})"
            self._changed(False, self._failure)

    def _changed(self, served: bool, reason: str) -> None:
        if self._state in ("stopped", "draining"):
            return
        if self._failure:
            # No broker that answers makes up for a part that is gone.
            served, reason = False, self._failure
        state: State = "serving" if served else "unreachable"
        if (state, reason) != (self._state, self._reason):
            self._state, self._reason = state, reason
            self._listener(served and not reason, reason)

    def _committed(self, batch: tuple[Completion, ...], ok: bool) -> None:
        self._metrics.committed(ok=ok)
        if not self._spans.enabled:
            return
        links = [link for completion in batch[:_MAX_LINKS] for link in completion.links]
        span = self._spans.start(
            names.SPAN_COMMIT,
            kind=SpanKind.CLIENT,
            links=links,
            attributes={
                names.MESSAGING_SYSTEM: names.SYSTEM_KAFKA,
                names.MESSAGING_OPERATION_NAME: "commit",
                names.MESSAGING_OPERATION_TYPE: "settle",
                names.MESSAGING_CONSUMER_GROUP_NAME: self._section.group_id,
                names.MESSAGING_BATCH_MESSAGE_COUNT: len(batch),
            },
        )
        if not ok:
            span.set_attribute(names.ERROR_TYPE, "not_committed")
        self._spans.end(span)

    async def _prepare(self, admin: AIOKafkaAdminClient) -> Sequence[str]:
        """The prompt topics to read. Raises `SetupError` when the topics do not fit together."""
        if self._section.create_topics:
            made = await topic_tools.create(
                admin, self._topics, partitions=self._section.partitions, replication_factor=self._section.replication_factor
            )
            if made:
                _log.info("topics were created", topics=list(made))
        report = await check(admin, self._connection, self._section)
        for finding in report.findings:
            # The embedded broker has said already that it keeps nothing.
            if finding.level == "warning" and not self._section.embedded:
                _log.warning("a topic does not fit", topic=finding.topic, reason=finding.message)
        if not report.ok:
            faults = "; ".join(f"{finding.topic} {finding.message}" for finding in report.findings if finding.level == "error")
            raise SetupError(faults, exit_code=3)
        if self._delivery is None:
            self._delivery = await choose(self._section, self._clients, self._topics)
            _log.info("delivery", mode=self._delivery.mode, reason=self._delivery.reason)
            self._commits = self._make_commits(self._delivery)
            self._consumer.attach(self._commits, self._make_handler(self._commits))
            self._run(self._commits.run(), "kafka commits")
        return [name for name in self._topics.classes if name in report.partitions]

    def _make_commits(self, delivery: Delivery) -> Commits:
        interval_s = self._section.commit_interval_ms / 1_000
        plain = Committer(self._output, self._consumer, interval_s=interval_s, on_commit=self._committed)
        if delivery.mode == "at_least_once":
            return plain

        def transactions(partition: TopicPartition) -> Transactions:
            name = transactional_id(self._section, partition)
            return Transactions(lambda: self._clients.transactional(name), group_id=self._section.group_id)

        return TransactionalCommitter(
            transactions, self._consumer, without_progress=plain, interval_s=interval_s, metrics=self._metrics,
            on_commit=self._committed,
        )  # fmt: skip

    def _make_handler(self, commits: Commits) -> PromptHandler:
        return PromptHandler(
            generation=self._generation,
            commits=commits,
            chunks=self._chunks if self._section.chunks_enabled else None,
            cancels=self.readers.cancels,
            result_keys=self._result_keys,
            topics=self._topics,
            section=self._section,
            spans=self._spans,
            metrics=self._metrics,
            wall_ns=self._wall_ns,
            monotonic_ns=self._monotonic_ns,
        )
