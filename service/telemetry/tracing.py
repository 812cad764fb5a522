"""Spans: one provider, the way in and out of headers, and the few verbs that give every span the same shape.

A `Tracing` owns its provider; nothing is registered globally, so that tests and the demo can hold several. Without an endpoint
and without memory it is the API's no-op: no span objects, no exporter, no thread. Nothing here makes a span *current*: a current
span across an await leaks into other requests, so contexts are passed by hand and spans are ended explicitly.
Stamps are CLOCK_MONOTONIC nanoseconds as everywhere in Sluice; they become epoch nanoseconds here and nowhere else.
Knows no requests; names come from `names.py`.
"""

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Link, NonRecordingSpan, NoOpTracerProvider, Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from service.config import TracingSection
from service.errors import CODES, Code
from service.telemetry import names

Headers = Sequence[tuple[str, str | bytes | None]]
"""Kafka record headers and gRPC metadata alike: (key, value) pairs, keys repeatable."""

Attributes = Mapping[str, AttributeValue]

_EXPORT_EVERY_MS = 1_000  # the SDK's 5 s make a trace late for whoever looks for it
_EXPORT_TIMEOUT_S = 10.0
_MAX_QUEUED_SPANS = 8_192
_MAX_CLOCK_DRIFT_NS = 1_000_000

_propagator = TraceContextTextMapPropagator()


class Tracing:
    """Makes spans, and exports them until `shutdown`. Thread-safe as the SDK's own provider is."""

    def __init__(
        self,
        section: TracingSection,
        *,
        version: str = "",
        memory: bool = False,
        wall_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`memory` also keeps every ended span for `spans()`: for the demo and for tests, since it has no bound."""
        self._wall_ns, self._monotonic_ns = wall_ns, monotonic_ns
        self._offset_ns = wall_ns() - monotonic_ns()
        self._provider: TracerProvider | None = None
        self._memory: InMemorySpanExporter | None = None
        if not section.otlp_endpoint and not memory:
            self.tracer: Tracer = NoOpTracerProvider().get_tracer(names.SCOPE)
            return
        resource = Resource.create(
            {
                names.SERVICE_NAME: section.service_name,
                names.SERVICE_VERSION: version,
                names.SERVICE_INSTANCE_ID: secrets.token_hex(8),
            }
        )
        sampler = ParentBasedTraceIdRatio(section.sample_ratio)
        # Sluice ends it in its own order; the SDK's exit hook would block an exit that is meant to be quick.
        self._provider = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
        if section.otlp_endpoint:
            self._provider.add_span_processor(_otlp(section.otlp_endpoint))
        if memory:
            self._memory = InMemorySpanExporter()
            self._provider.add_span_processor(SimpleSpanProcessor(self._memory))
        self.tracer = self._provider.get_tracer(names.SCOPE, version, schema_url=names.SCHEMA_URL)

    @property
    def enabled(self) -> bool:
        """Whether spans go anywhere; False is the no-op."""
        return self._provider is not None

    def start(
        self,
        name: str,
        *,
        parent: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes | None = None,
        links: Sequence[Link] = (),
        at_ns: int = 0,
    ) -> Span:
        """A started span, not current. `parent` None begins a trace; `at_ns` is a monotonic stamp, 0 for now. End it with `end`.

        Attributes that are costly to make are better set once it is known that it `is_recording`.
        """
        if parent is not None:
            above = trace.get_current_span(parent).get_span_context()
            if above.is_valid and not above.trace_flags.sampled:
                # Nothing below it is sampled either; the SDK would take ten times as long to say so.
                return NonRecordingSpan(above)
        return self.tracer.start_span(
            name,
            # None would mean the ambient context to the SDK, which Sluice never uses.
            context=Context() if parent is None else parent,
            kind=kind,
            attributes=attributes,
            links=links,
            start_time=self.epoch_ns(at_ns) if at_ns else None,
            record_exception=False,
            set_status_on_exception=False,
        )

    def end(self, span: Span, *, at_ns: int = 0) -> None:
        """Ends a span now, or at a monotonic stamp."""
        span.end(self.epoch_ns(at_ns) if at_ns else None)

    def event(self, span: Span, name: str, attributes: Attributes | None = None, *, at_ns: int = 0) -> None:
        """Adds an event (about 8 µs: never one a token) now, or at a monotonic stamp."""
        span.add_event(name, attributes, self.epoch_ns(at_ns) if at_ns else None)

    def epoch_ns(self, at_ns: int) -> int:
        """Epoch nanoseconds of a monotonic stamp.

        One offset serves all, so that stamps keep their distances; it is taken anew once the wall clock has been moved.
        """
        offset = self._wall_ns() - self._monotonic_ns()
        if abs(offset - self._offset_ns) > _MAX_CLOCK_DRIFT_NS:
            self._offset_ns = offset
        return at_ns + self._offset_ns

    def spans(self) -> tuple[ReadableSpan, ...]:
        """The spans that have ended, oldest first; empty unless made with `memory`."""
        return () if self._memory is None else self._memory.get_finished_spans()

    def shutdown(self, timeout_s: float = 3.0) -> bool:
        """Exports what is left; False when that took longer than `timeout_s` and was given up. Blocks; idempotent."""
        provider, self._provider = self._provider, None
        if provider is None:
            return True
        # A collector that does not answer holds the SDK for its whole export timeout; a daemon thread does not hold the exit.
        worker = threading.Thread(target=provider.shutdown, name="tracing-shutdown", daemon=True)
        worker.start()
        worker.join(timeout_s)
        return not worker.is_alive()


def _otlp(endpoint: str) -> BatchSpanProcessor:
    plain = endpoint.removeprefix("http://")
    exporter = OTLPSpanExporter(endpoint=plain, insecure=not endpoint.startswith("https://"), timeout=_EXPORT_TIMEOUT_S)
    return BatchSpanProcessor(exporter, max_queue_size=_MAX_QUEUED_SPANS, schedule_delay_millis=_EXPORT_EVERY_MS)


class _HeaderGetter(Getter[Headers]):
    def get(self, carrier: Headers, key: str) -> list[str] | None:
        found = [value for name, value in carrier if name.lower() == key and value is not None]
        # Bytes that are no ASCII cannot be a trace context; replaced, they fail the propagator's own check.
        return [value if isinstance(value, str) else value.decode("ascii", "replace") for value in found] or None

    def keys(self, carrier: Headers) -> list[str]:
        return [name.lower() for name, _ in carrier]


_getter = _HeaderGetter()


def extract(headers: Headers) -> Context:
    """The trace context that `traceparent` and `tracestate` name; an empty one when there is none or it is malformed."""
    return _propagator.extract(headers, Context(), _getter)


def inject(span: Span) -> list[tuple[str, str]]:
    """`traceparent` (and `tracestate`) for whoever continues after `span`; empty when there is no trace."""
    if span.get_span_context().trace_state:
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, context_of(span))
        return list(carrier.items())
    header = traceparent(span)
    return [("traceparent", header)] if header else []


def traceparent(span: Span) -> str:
    """The W3C traceparent of a span, "" without a trace."""
    context = span.get_span_context()
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def context_of(span: Span) -> Context:
    """A context for children of `span`, holding nothing else."""
    return trace.set_span_in_context(span, Context())


def link_to(context: Context, *, is_parent: bool = False) -> tuple[Link, ...]:
    """A link to the span that a context holds; none where it holds no valid one. `is_parent`: the linked span is the parent too."""
    target = trace.get_current_span(context).get_span_context()
    # Jaeger keeps one reference to a span: a link to the parent takes the parent's place, as FOLLOWS_FROM unless it says otherwise.
    attributes = {names.OPENTRACING_REF_TYPE: names.REF_CHILD_OF} if is_parent else None
    return (Link(target, attributes),) if target.is_valid else ()


def trace_id(span: Span) -> str:
    """32 hexadecimal digits, "" without a trace."""
    context = span.get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def record_error(span: Span, code: Code) -> None:
    """Marks a span as failed with a code of the product's one list; its description is the table's fixed text, never a caller's."""
    span.set_attribute(names.ERROR_TYPE, code)
    span.set_status(Status(StatusCode.ERROR, f"{code}: {CODES[code].meaning}"))


def hashed(tenant: str) -> str:
    """What stands for a tenant on spans: equal tenants look equal, and none can be read back at sight. "" stays ""."""
    return hashlib.sha256(b"sluice.tenant\0" + tenant.encode()).hexdigest()[:16] if tenant else ""
