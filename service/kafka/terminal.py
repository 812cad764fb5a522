"""The terminal records of a prompt: its result, and its dead letter where the code asks for one.

Guarantees: they always fit (a result drops its logprobs, then its choices; a dead letter its value, headers and key); whatever is
refused all the same is replaced by something smaller as long as there is any. Text enters neither logs nor spans.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opentelemetry.trace import Span, SpanKind

from schemas.v1 import inference_pb2
from service import wire
from service.contract import Failed, Finished
from service.errors import RequestError
from service.kafka.chunks import LiveListener
from service.kafka.codec import Envelope, result_record, too_large, without_logprobs
from service.kafka.completion import Completion
from service.kafka.dead_letter import Stage, dead_letter
from service.kafka.idempotency import Known
from service.kafka.ownership import OwnedPartition
from service.kafka.records import Headers, InRecord, OutRecord
from service.kafka.topics import Topics
from service.telemetry import names, tracing
from service.telemetry.metrics import KafkaMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A prompt record that this replica works on."""

    record: InRecord
    envelope: Envelope
    owned: OwnedPartition
    attempt: int

    @property
    def request_id(self) -> str:
        return self.envelope.request_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a prompt ended: with an event of a generation, or (`event` None) with an error before there was one."""

    event: Finished | Failed | None
    error: RequestError | None
    stage: Stage
    label: str = ""
    model: str = ""
    repeats: inference_pb2.Result | None = None
    """The finished result of an earlier prompt with the same idempotency key."""


class Terminals:
    """Makes completions of endings."""

    def __init__(
        self,
        topics: Topics,
        *,
        max_bytes: int,
        spans: tracing.Tracing,
        metrics: KafkaMetrics,
        wall_ns: Callable[[], int],
        listener: LiveListener | None,
    ) -> None:
        """`max_bytes`: of a record. `listener` hears of each result once it is durable."""
        self._topics = topics
        self._max_bytes = max_bytes
        self._spans, self._metrics, self._wall_ns, self._listener = spans, metrics, wall_ns, listener

    def tombstone(self, taken: Taken, span: Span, release: Callable[[], None]) -> Completion:
        """A record without a value: done, without a result."""
        return self._completion(taken, (), lambda num_taken: (), lambda durable: None, span, release)

    def completion(self, taken: Taken, span: Span, ending: Ending, release: Callable[[], None]) -> Completion:
        """The terminal records of `ending`. `span` is the prompt's; it ends, and `release` is called, when they are settled."""
        send = self._start_send(taken, span)
        trace_headers: Headers = tuple((name, value.encode()) for name, value in tracing.inject(send))
        result = self._result(taken, ending, tracing.trace_id(span))
        first = "" if ending.repeats is None else ending.repeats.request_id
        written, result, misfit = self._fitting(taken.envelope, result, trace_headers, first)
        error = misfit or ending.error
        stage = ending.stage if misfit is None else "write"

        def letter(max_bytes: int) -> tuple[OutRecord, ...]:
            if error is None or not error.info.dead_letter:
                return ()
            return (
                dead_letter(
                    self._topics.dead_letters,
                    taken.record,
                    error,
                    stage=stage,
                    attempts=taken.attempt,
                    time_ns=self._wall_ns(),
                    max_bytes=max_bytes,
                    trace_headers=trace_headers,
                ),
            )

        def smaller(num_taken: int) -> tuple[OutRecord, ...]:
            nonlocal error, stage, result
            if num_taken:
                # The result stands; its letter is what the broker does not take.
                return letter(0)
            result, error = too_large(result)
            stage = "write"
            return (result_record(self._topics.results, taken.envelope, result, trace_headers), *letter(self._max_bytes))

        stands = -1

        def written_at(offsets: Sequence[int]) -> None:
            nonlocal stands
            if offsets:
                stands = offsets[0]
                taken.owned.keys.written(stands + 1)

        def settled(durable: bool) -> None:
            finished = durable and result.status == inference_pb2.Result.finished and ending.repeats is None
            self._settle_key(taken, stands if finished else None)
            if durable and self._listener is not None:
                self._listener.ended(taken.envelope.source, result)
            self._spans.end(send)
            if durable and error is not None:
                tracing.record_error(span, error.code)
                if error.info.dead_letter:
                    self._metrics.dead_letter(error.code)

        records = (written, *letter(self._max_bytes))
        return self._completion(taken, records, smaller, settled, span, release, written_at)

    def _start_send(self, taken: Taken, span: Span) -> Span:
        send = self._spans.start(names.SPAN_SEND_RESULTS, kind=SpanKind.PRODUCER, parent=tracing.context_of(span))
        if send.is_recording():
            send.set_attributes(
                {
                    names.MESSAGING_SYSTEM: names.SYSTEM_KAFKA,
                    names.MESSAGING_OPERATION_NAME: "send",
                    names.MESSAGING_OPERATION_TYPE: "send",
                    names.MESSAGING_DESTINATION_NAME: self._topics.results,
                    names.MESSAGING_DESTINATION_PARTITION_ID: str(taken.record.partition),
                }
            )
        return send

    def _settle_key(self, taken: Taken, stands: int | None) -> None:
        """The prompt's idempotency key is known from now on by a result that stands there (-1: not known where), or (None) is free."""
        key, keys = taken.envelope.idempotency_key, taken.owned.keys
        if key is None:
            return
        known = None
        if stands is not None:
            known = Known(
                result_offset=stands if stands >= 0 else keys.end,
                request_id=taken.request_id,
                digest=taken.envelope.prompt_digest,
                time_ms=self._wall_ns() // 1_000_000,
            )
        keys.settle(key, taken.record.offset, known)

    def _result(self, taken: Taken, ending: Ending, trace_id: str) -> inference_pb2.Result:
        if ending.repeats is not None:
            result = inference_pb2.Result()
            result.CopyFrom(ending.repeats)
            result.request_id, result.label, result.trace_id = taken.request_id, ending.label, trace_id
            result.epoch, result.attempt = taken.owned.epoch, taken.attempt
            result.source.CopyFrom(wire.source_to_proto(taken.envelope.source))
            result.time.CopyFrom(wire.timestamp(self._wall_ns()))
            return result
        if ending.event is not None:
            return wire.result_to_proto(
                ending.event,
                request_id=taken.request_id,
                time_ns=self._wall_ns(),
                label=ending.label,
                model=ending.model,
                source=taken.envelope.source,
                epoch=taken.owned.epoch,
                attempt=taken.attempt,
            )
        assert ending.error is not None
        return wire.refusal_to_proto(
            ending.error,
            request_id=taken.request_id,
            time_ns=self._wall_ns(),
            label=ending.label,
            model=ending.model,
            trace_id=trace_id,
            source=taken.envelope.source,
            epoch=taken.owned.epoch,
            attempt=taken.attempt,
        )

    def _fitting(
        self, envelope: Envelope, result: inference_pb2.Result, trace_headers: Headers, duplicate_of: str
    ) -> tuple[OutRecord, inference_pb2.Result, RequestError | None]:
        """The result within the limit and its record: whole, without logprobs, or as `result_too_large`."""
        for shrink in (_whole, without_logprobs):
            candidate = shrink(result)
            # Neither form is smaller than the binary one: what cannot fit is not spelled out, which would hold up the loop.
            if candidate.ByteSize() > self._max_bytes:
                continue
            written = result_record(self._topics.results, envelope, candidate, trace_headers, duplicate_of=duplicate_of)
            if written.num_bytes <= self._max_bytes:
                return written, candidate, None
        shrunk, error = too_large(result)
        return result_record(self._topics.results, envelope, shrunk, trace_headers), shrunk, error

    def _completion(
        self,
        taken: Taken,
        records: tuple[OutRecord, ...],
        replacement: Callable[[int], tuple[OutRecord, ...]],
        settled: Callable[[bool], None],
        span: Span,
        release: Callable[[], None],
        written: Callable[[Sequence[int]], None] = lambda offsets: None,
    ) -> Completion:
        owned, offset = taken.owned, taken.record.offset

        def end(durable: bool) -> None:
            if not durable:
                owned.tracker.release(offset)
            settled(durable)
            self._spans.end(span)
            release()

        links = tracing.link_to(tracing.context_of(span)) if span.is_recording() else ()
        return Completion(
            owned=owned, offset=offset, records=records, replacement=replacement, settled=end, written=written, links=links
        )


def _whole(result: inference_pb2.Result) -> inference_pb2.Result:
    return result
