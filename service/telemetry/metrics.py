"""Metrics: one registry held by one object; what is counted is said in verbs, grouped by who reports it.

Guarantees: nothing is global (two `Metrics` never share a number), label values come from closed sets (codes, transports, the
served model, owned partitions), so that a caller cannot grow the registry. Histograms of finished requests carry their trace id
as an exemplar, which shows in the OpenMetrics exposition. One observation a request or step, never one a token.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

from engine import StepStats
from service.contract import Timings, Usage
from service.errors import Code
from service.telemetry import names

_REQUEST_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_OUTPUT_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LAG_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Labelled:
    """The series of one model and transport, looked up once."""

    prompt: Counter
    cached: Counter
    said: Counter
    duration: Histogram
    first: Histogram
    per_token: Histogram


class RequestMetrics:
    """Requests of every transport: reported by admission and `generation.py`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        by = (names.LOG_MODEL, names.LOG_TRANSPORT)
        self._total = Counter(
            names.METRIC_REQUESTS, "Accepted requests that ended, by code", (*by, names.LOG_CODE), registry=registry
        )
        self._duration = Histogram(
            names.METRIC_REQUEST_DURATION, "Admission to the last token, seconds", by, buckets=_REQUEST_S, registry=registry
        )
        self._first = Histogram(
            names.METRIC_TIME_TO_FIRST_TOKEN,
            "Admission to the first token, seconds",
            by,
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self._per_token = Histogram(
            names.METRIC_TIME_PER_OUTPUT_TOKEN,
            "(Last - first token) / (tokens - 1), seconds",
            by,
            buckets=_OUTPUT_TOKEN_S,
            registry=registry,
        )
        self._refusals = Counter(
            names.METRIC_REFUSALS,
            "Requests refused before acceptance",
            (names.LOG_TRANSPORT, names.LOG_CODE),
            registry=registry,
        )
        self._misses = Counter(names.METRIC_DEADLINE_MISSES, "Deadlines that passed, by stage", ("stage",), registry=registry)
        self._prompt = Counter(names.METRIC_PROMPT_TOKENS, "Prompt tokens of ended requests", by, registry=registry)
        self._cached = Counter(
            names.METRIC_CACHED_PROMPT_TOKENS, "Of them, tokens from the prefix cache", by, registry=registry
        )
        self._said = Counter(names.METRIC_COMPLETION_TOKENS, "Tokens said", by, registry=registry)
        self._by: dict[tuple[str, str], _Labelled] = {}
        # What changes several times a request is read where it is kept, when somebody asks.
        self._admission: Callable[[], tuple[int, int, int]] = lambda: (0, 0, 0)
        for place, (name, text) in enumerate(
            (
                (names.METRIC_QUEUE_DEPTH, "Requests that wait for admission"),
                (names.METRIC_ADMITTED_REQUESTS, "Requests admitted and unfinished"),
                (names.METRIC_ADMITTED_TOKENS, "Their prompt + max_tokens"),
            )
        ):
            Gauge(name, text, registry=registry).set_function(functools.partial(self._now, place))

    def finished(
        self,
        *,
        model: str,
        transport: str,
        usage: Usage,
        num_new_tokens: int,
        timings: Timings,
        code: Code | None = None,
        trace_id: str = "",
    ) -> None:
        """An accepted request has ended; `code` None is success. Durations of failed ones are not mixed into the histograms.

        `num_new_tokens`: completion tokens without those that an earlier attempt said, and counted.
        """
        by = self._by.get((model, transport))
        if by is None:
            by = self._by[model, transport] = self._labelled(model, transport)
        self._total.labels(model, transport, code or "ok").inc()
        by.prompt.inc(usage.prompt_tokens)
        by.cached.inc(usage.cached_prompt_tokens)
        by.said.inc(num_new_tokens)
        if code == "deadline_exceeded":
            self.deadline_missed("running")
        if code is not None:
            return
        exemplar = {names.LOG_TRACE_ID: trace_id} if trace_id else None
        by.duration.observe(timings.total_ms / 1e3, exemplar)
        # 0 stands for what never happened: a continuation that said nothing more, or one token a choice.
        if timings.ttft_ms:
            by.first.observe(timings.ttft_ms / 1e3, exemplar)
        if timings.tpot_ms:
            by.per_token.observe(timings.tpot_ms / 1e3, exemplar)

    def _labelled(self, model: str, transport: str) -> "_Labelled":
        return _Labelled(
            prompt=self._prompt.labels(model, transport),
            cached=self._cached.labels(model, transport),
            said=self._said.labels(model, transport),
            duration=self._duration.labels(model, transport),
            first=self._first.labels(model, transport),
            per_token=self._per_token.labels(model, transport),
        )

    def refused(self, *, transport: str, code: Code) -> None:
        """A request was refused before acceptance."""
        self._refusals.labels(transport, code).inc()
        if code == "deadline_exceeded":
            self.deadline_missed("admission")

    def deadline_missed(self, stage: str) -> None:
        """A deadline passed in a stage: admission, running or another fixed word."""
        self._misses.labels(stage).inc()

    def admission(self, read: Callable[[], tuple[int, int, int]]) -> None:
        """Where the state of admission is read: requests that wait, requests admitted, and the tokens of the latter."""
        self._admission = read

    def _now(self, place: int) -> float:
        return float(self._admission()[place])


class EngineMetrics:
    """The engine child: reported by whoever reads its steps and supervises it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        running = Gauge(names.METRIC_RUNNING_SEQUENCES, "Sequences that run", registry=registry)
        waiting = Gauge(names.METRIC_WAITING_SEQUENCES, "Sequences that wait inside the engine", registry=registry)
        wasted = Gauge(names.METRIC_KV_WASTED_SLOTS, "Slots of used blocks without a computed token", registry=registry)
        blocks = Gauge(names.METRIC_KV_BLOCKS, "KV blocks: free, evictable, used", ("state",), registry=registry)
        # There are hundreds of steps a second: states are read when somebody asks, labels are looked up once, zeros are not counted.
        self._stats: StepStats | None = None
        for gauge, field in (
            (running, "num_running"),
            (waiting, "num_waiting"),
            (blocks.labels("free"), "num_free_blocks"),
            (blocks.labels("evictable"), "num_evictable_blocks"),
            (blocks.labels("used"), "num_used_blocks"),
            (wasted, "num_wasted_slots"),
        ):
            gauge.set_function(functools.partial(self._now, field))
        self._queried = Counter(names.METRIC_PREFIX_QUERY_TOKENS, "Tokens looked up in the prefix cache", registry=registry)
        self._hits = Counter(names.METRIC_PREFIX_HIT_TOKENS, "Tokens found there", registry=registry)
        self._preemptions = Counter(names.METRIC_PREEMPTIONS, "Sequences that gave up their blocks", registry=registry)
        self._step = Histogram(names.METRIC_STEP_DURATION, "One step, seconds", buckets=_STEP_S, registry=registry)
        tokens = Counter(names.METRIC_STEP_TOKENS, "Tokens computed, by kind of chunk", ("kind",), registry=registry)
        self._prefill, self._decode = tokens.labels("prefill"), tokens.labels("decode")
        self._deaths = Counter(names.METRIC_ENGINE_DEATHS, "Engine children that died or hung", registry=registry)
        self._restarts = Counter(names.METRIC_ENGINE_RESTARTS, "Engine children started after a death", registry=registry)

    def step(self, stats: StepStats) -> None:
        """One step's numbers. Its counts are of this step alone, not sums."""
        self._stats = stats
        for counter, count in (
            (self._queried, stats.num_prefix_query_tokens),
            (self._hits, stats.num_prefix_hit_tokens),
            (self._preemptions, stats.num_preemptions),
            (self._prefill, stats.num_prefill_tokens),
            (self._decode, stats.num_decode_tokens),
        ):
            if count:
                counter.inc(count)
        self._step.observe((stats.ended_ns - stats.started_ns) / 1e9)

    def _now(self, field: str) -> float:
        return 0.0 if self._stats is None else float(getattr(self._stats, field))

    def died(self) -> None:
        """The child ended, hung or spoke garbage."""
        self._deaths.inc()
        if self._stats is not None:
            self._stats = dataclasses.replace(self._stats, num_running=0, num_waiting=0)

    def restarted(self) -> None:
        """A new child is ready after a death."""
        self._restarts.inc()


class KafkaMetrics:
    """The Kafka transport. A partition's series end with `forget`, once it is owned no longer."""

    def __init__(self, registry: CollectorRegistry) -> None:
        by = ("topic", "partition")
        self._lag = Gauge(names.METRIC_KAFKA_LAG, "Records behind the end of the partition", by, registry=registry)
        self._backlog = Gauge(
            names.METRIC_KAFKA_BACKLOG_S, "Age of the oldest prompt of the partition that has not ended", by, registry=registry
        )
        self._window = Gauge(names.METRIC_KAFKA_WINDOW, "Offsets taken and not yet committed", by, registry=registry)
        self._intake = Gauge(names.METRIC_KAFKA_INTAKE_TOKENS, "Estimated tokens taken and unfinished", registry=registry)
        self._paused = Gauge(names.METRIC_KAFKA_PAUSED, "Partitions held back", registry=registry)
        self._connected = Gauge(names.METRIC_KAFKA_CONNECTED, "1 while the broker answers", registry=registry)
        self._records = Counter(names.METRIC_KAFKA_RECORDS, "Prompt records taken", ("topic",), registry=registry)
        self._commits = Counter(
            names.METRIC_KAFKA_COMMITS, "Offset commits (transactions, where there are any)", ("outcome",), registry=registry
        )
        self._dead = Counter(names.METRIC_KAFKA_DEAD_LETTERS, "Dead letters, by code", (names.LOG_CODE,), registry=registry)
        self._again = Counter(
            names.METRIC_KAFKA_REDELIVERIES, "Records seen again, by what was done", ("outcome",), registry=registry
        )
        self._rebalances = Counter(names.METRIC_KAFKA_REBALANCES, "Assignments received", registry=registry)
        self._fenced = Counter(
            names.METRIC_KAFKA_FENCED, "Transactions that another owner of the partition fenced", registry=registry
        )
        self._duplicates = Counter(
            names.METRIC_KAFKA_DUPLICATES, "Prompts answered with an earlier one's result by idempotency key", registry=registry
        )
        self._handed_over = Counter(
            names.METRIC_KAFKA_HANDOVERS, "Running prompts given up for another owner to go on", registry=registry
        )

        self._retired = Counter(
            names.METRIC_KAFKA_RETIRED, "Partitions whose topic was deleted while this replica had them", registry=registry
        )

    def retired(self) -> None:
        """The topic of an owned partition was deleted."""
        self._retired.inc()

    def duplicate(self) -> None:
        """A prompt was answered with the result of an earlier one, whose idempotency key it had."""
        self._duplicates.inc()

    def lag(self, topic: str, partition: int, records: int, oldest_s: float = 0.0) -> None:
        """Records between the position and the end of an owned partition, and the age of the oldest that has not ended."""
        self._lag.labels(topic, partition).set(records)
        self._backlog.labels(topic, partition).set(oldest_s)

    def window(self, topic: str, partition: int, offsets: int) -> None:
        """Offsets of an owned partition that are taken and not committed."""
        self._window.labels(topic, partition).set(offsets)

    def forget(self, topic: str, partition: int) -> None:
        """The partition is owned no longer; unknown ones are ignored."""
        for gauge in (self._lag, self._backlog, self._window):
            gauge.remove_by_labels({"topic": topic, "partition": str(partition)})

    def intake(self, *, tokens: int, paused_partitions: int) -> None:
        """The state of the intake after a change."""
        self._intake.set(tokens)
        self._paused.set(paused_partitions)

    def connected(self, value: bool) -> None:
        """Whether the broker answers."""
        self._connected.set(value)

    def records(self, topic: str, count: int = 1) -> None:
        """Prompt records taken."""
        self._records.labels(topic).inc(count)

    def committed(self, *, ok: bool) -> None:
        """One commit, or one that failed and is tried again."""
        self._commits.labels("ok" if ok else "failed").inc()

    def dead_letter(self, code: Code) -> None:
        """A dead letter was written."""
        self._dead.labels(code).inc()

    def redelivered(self, outcome: Literal["skipped", "repeated", "resumed"]) -> None:
        """A record came again: skipped since its done-bit is set, begun again, or continued where an earlier owner stopped."""
        self._again.labels(outcome).inc()

    def fenced(self) -> None:
        """Another owner's producer took over in the middle of a transaction."""
        self._fenced.inc()

    def handed_over(self) -> None:
        """A prompt that ran was given up: its partition was lost, or this replica stops."""
        self._handed_over.inc()

    def rebalanced(self) -> None:
        """The group gave a new assignment."""
        self._rebalances.inc()


class StreamMetrics:
    """gRPC streams."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._open = Gauge(names.METRIC_STREAMS, "Open token streams", registry=registry)
        self._messages = Counter(names.METRIC_STREAM_MESSAGES, "Messages written to streams", registry=registry)
        self._merges = Counter(names.METRIC_STREAM_MERGES, "Deltas merged into an unsent one", registry=registry)
        self._slow = Counter(names.METRIC_SLOW_READERS, "Streams ended since their reader took nothing", registry=registry)

    def opened(self) -> None:
        """A stream began."""
        self._open.inc()

    def closed(self, *, messages: int, merges: int) -> None:
        """A stream ended, however it did."""
        self._open.dec()
        self._messages.inc(messages)
        self._merges.inc(merges)

    def slow_reader(self) -> None:
        """A stream was ended since its reader took nothing."""
        self._slow.inc()


class Metrics:
    """Every number of one Sluice process, in `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = RequestMetrics(self.registry)
        self.engine = EngineMetrics(self.registry)
        self.kafka = KafkaMetrics(self.registry)
        self.streams = StreamMetrics(self.registry)
        self._loop_lag = Histogram(
            names.METRIC_LOOP_LAG, "How late the event loop ran a timer, seconds", buckets=_LAG_S, registry=self.registry
        )
        self._ready = Gauge(names.METRIC_READY, "1 while requests are taken", registry=self.registry)

    def loop_lag(self, seconds: float) -> None:
        """How late the event loop ran a timer."""
        self._loop_lag.observe(seconds)

    def ready(self, value: bool) -> None:
        """Whether requests are taken."""
        self._ready.set(value)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its content type, in the format that an Accept header asks for (exemplars: OpenMetrics only)."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type
