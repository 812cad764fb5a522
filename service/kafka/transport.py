"""Kafka as a transport: one object that the application starts and drains.

It never keeps the rest of the service from running: with the broker away at start or later it reports itself unserved and tries
again. Delivery is at least once (see `committer.py`). Constructs the parts of this package; knows no gRPC or HTTP.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from opentelemetry.trace import SpanKind

from service.config import KafkaSection
from service.errors import SetupError
from service.kafka import topics as topic_tools
from service.kafka.budget import IntakeBudget
from service.kafka.cancels import Cancels
from service.kafka.chunks import ChunkWriter
from service.kafka.committer import Committer
from service.kafka.connection import Connection
from service.kafka.consumer import PromptConsumer
from service.kafka.handler import Generates, PromptHandler
from service.kafka.live import LiveRequests
from service.kafka.output import REQUEST_OVERHEAD_BYTES, ProducerOutput
from service.kafka.ownership import Partitions
from service.kafka.records import TopicPartition
from service.kafka.topic_check import check
from service.kafka.topics import Topics
from service.telemetry import names, tracing
from service.telemetry.metrics import KafkaMetrics

_log = structlog.get_logger(__name__)

_REBALANCE_TIMEOUT_MS = 30_000
_FLUSH_S = 10.0

State = Literal["stopped", "connecting", "serving", "unreachable", "draining"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KafkaStatus:
    """A moment of the transport. `reason` says why it is not serving, or which partitions it serves not."""

    state: State
    reason: str = ""
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
        self._output = ProducerOutput(self._make_producer)
        self._live = LiveRequests()
        self._cancels = Cancels(since_ms=wall_ns() // 1_000_000, on_cancel=generation.cancel)
        self._metrics = metrics
        self._consumer = PromptConsumer(
            section=section,
            topics=self._topics,
            partitions=self._partitions,
            budget=self._budget,
            metrics=metrics,
            make_consumer=self._make_consumer,
            make_admin=self._make_admin,
            prepare=self._prepare,
            explain=self._connection.explain,
            engine_alive=engine_alive,
            on_state=self._changed,
        )
        self._committer = Committer(
            self._output, self._consumer, interval_s=section.commit_interval_ms / 1_000, on_commit=self._committed
        )
        self._chunks = ChunkWriter(
            self._output,
            topic=self._topics.chunks,
            interval_s=section.chunk_interval_ms / 1_000,
            max_tokens=section.chunk_max_tokens,
            wall_ns=wall_ns,
            listener=self._live,
        )
        handler = PromptHandler(
            generation=generation,
            committer=self._committer,
            chunks=self._chunks if section.chunks_enabled else None,
            cancels=self._cancels,
            topics=self._topics,
            section=section,
            spans=spans,
            metrics=metrics,
            wall_ns=wall_ns,
            monotonic_ns=monotonic_ns,
        )
        self._consumer.attach(self._committer, handler)

    async def start(self) -> None:
        """Begins to connect; whether it has is told by `status` and `on_state`."""
        self._state = "connecting"
        for work, name in (
            (self._consumer.run(), "kafka consumer"),
            (self._committer.run(), "kafka committer"),
            (self._chunks.run(), "kafka chunks"),
        ):
            task = asyncio.create_task(work, name=name)
            self._tasks.add(task)
            task.add_done_callback(self._part_ended)

    async def drain(self, grace_s: float) -> bool:
        """Stops taking prompts, lets running ones finish for `grace_s`, writes and commits, leaves the group; idempotent.

        What did not finish is given back: it comes again to another replica. True when nothing was.
        """
        if self._state == "stopped":
            return True
        self._state = "draining"
        self._consumer.stop_polling()
        running = {task for owned in self._partitions for task in owned.tasks()}
        late: set[asyncio.Task[None]] = set()
        if running:
            _, late = await asyncio.wait(running, timeout=grace_s or 0.0)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        try:
            async with asyncio.timeout(_FLUSH_S):
                await self._chunks.flush()
                await self._committer.flush()
            flushed = True
        except TimeoutError:
            flushed = False
        await self._stop()
        return flushed and not late

    async def close(self) -> None:
        """Ends at once; what ran is given back. Idempotent."""
        await self.drain(0.0)

    def status(self) -> KafkaStatus:
        """Now."""
        return KafkaStatus(
            state=self._state,
            reason=self._reason,
            partitions=sum(owned.state == "open" for owned in self._partitions),
            running=self._partitions.num_running,
            intake_tokens=self._budget.used,
            paused_partitions=len(self._consumer.paused),
        )

    async def _stop(self) -> None:
        self._state = "stopped"
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._committer.abandon()
        for owned in self._partitions:
            self._partitions.lose(owned.partition)
            self._metrics.forget(*owned.partition)
        await self._output.close()

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

    def _committed(self, points: Mapping[TopicPartition, tuple[int, str]], ok: bool) -> None:
        self._metrics.committed(ok=ok)
        if not self._spans.enabled:
            return
        span = self._spans.start(
            names.SPAN_COMMIT,
            kind=SpanKind.CLIENT,
            attributes={
                names.MESSAGING_SYSTEM: names.SYSTEM_KAFKA,
                names.MESSAGING_OPERATION_NAME: "commit",
                names.MESSAGING_OPERATION_TYPE: "settle",
                names.MESSAGING_CONSUMER_GROUP_NAME: self._section.group_id,
                names.MESSAGING_BATCH_MESSAGE_COUNT: len(points),
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
        return [name for name in self._topics.classes if name in report.partitions]

    def _make_consumer(self) -> AIOKafkaConsumer:
        section = self._section

        class Assignor(StickyPartitionAssignor):
            """aiokafka keeps the sticky assignor's memory on its class: each consumer has its own."""

        return AIOKafkaConsumer(
            **self._connection.aiokafka(),
            group_id=section.group_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            # Exactly one: aiokafka joins once an assignor, which breaks the join.
            partition_assignment_strategy=(Assignor,),
            session_timeout_ms=section.session_timeout_ms,
            heartbeat_interval_ms=section.heartbeat_interval_ms,
            rebalance_timeout_ms=_REBALANCE_TIMEOUT_MS,
            max_partition_fetch_bytes=section.max_partition_fetch_bytes,
        )

    def _make_producer(self) -> AIOKafkaProducer:
        return AIOKafkaProducer(
            **self._connection.aiokafka(),
            enable_idempotence=True,
            acks="all",
            max_request_size=self._section.max_result_bytes + REQUEST_OVERHEAD_BYTES,
        )

    def _make_admin(self) -> AIOKafkaAdminClient:
        return AIOKafkaAdminClient(**self._connection.aiokafka())
