"""One prompt record from its bytes to its terminal records: decode, generate, chunks, result or dead letter.

Guarantees: a taken record ends in exactly one completion handed to the committer, or is given back undone (its partition was lost,
or this replica is stopping) and comes again elsewhere; `release` is called exactly once, when it is durable or given back.
The span `process prompts` covers all of it and ends when the terminal record is durable. Text enters neither logs nor spans.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import structlog
from opentelemetry.trace import Span, SpanKind

from schemas.v1 import inference_pb2
from service import wire
from service.config import KafkaSection
from service.contract import Call, Delta, Event, Failed, Finished, PromptRequest, Started
from service.errors import CODES, RequestError
from service.kafka.cancels import Cancels
from service.kafka.chunks import ChunkStream, ChunkWriter
from service.kafka.codec import Envelope, read_prompt, result_record, too_large, without_logprobs
from service.kafka.committer import Committer, Completion
from service.kafka.dead_letter import Stage, dead_letter
from service.kafka.ownership import OwnedPartition
from service.kafka.records import Headers, InRecord, OutRecord
from service.kafka.topics import Topics
from service.telemetry import names, tracing
from service.telemetry.metrics import KafkaMetrics

_log = structlog.get_logger(__name__)

TRANSPORT = "kafka"
_RETRY_MIN_S, _RETRY_MAX_S = 0.2, 5.0


class EventStream(Protocol):
    """A running generation: its events, ended by exactly one `Finished` or `Failed`; closing it early aborts it."""

    def __aiter__(self) -> AsyncIterator[Event]: ...
    async def __anext__(self) -> Event: ...
    async def aclose(self) -> None: ...


class Generates(Protocol):
    """The one use case (`service.generation.Generation`)."""

    async def start(self, prompt: PromptRequest, call: Call) -> EventStream:
        """Raises `RequestError` when the prompt is not accepted."""
        ...

    def cancel(self, request_id: str) -> bool:
        """Ends a running or waiting request; False when there is none of that id."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a prompt ended: with an event of a generation, or (`event` None) with an error before there was one."""

    event: Finished | Failed | None
    error: RequestError | None
    stage: Stage
    label: str = ""
    model: str = ""


class PromptHandler:
    """Handles records of every partition; keeps no state between them."""

    def __init__(
        self,
        *,
        generation: Generates,
        committer: Committer,
        chunks: ChunkWriter | None,
        cancels: Cancels,
        topics: Topics,
        section: KafkaSection,
        spans: tracing.Tracing,
        metrics: KafkaMetrics,
        wall_ns: Callable[[], int],
        monotonic_ns: Callable[[], int],
    ) -> None:
        self._generation = generation
        self._committer = committer
        self._chunks = chunks
        self._cancels = cancels
        self._topics = topics
        self._section = section
        self._spans = spans
        self._metrics = metrics
        self._wall_ns, self._monotonic_ns = wall_ns, monotonic_ns

    async def handle(self, record: InRecord, owned: OwnedPartition, *, attempt: int, release: Callable[[], None]) -> None:
        """The whole life of a record that `owned.tracker` has handed out."""
        envelope = Envelope.of(record)
        span = self._start_span(record, envelope, owned.epoch, attempt)
        completion: Completion | None = None
        self._cancels.cover(record.timestamp)
        try:
            if record.value is None:
                completion = self._completion(owned, record, (), lambda num_durable: (), lambda durable: None, span, release)
            else:
                ending = await self._run(record, envelope, owned, attempt, span)
                if ending is not None:
                    completion = self._ended(record, envelope, owned, attempt, span, ending, release)
        finally:
            if completion is None:
                # Lost, stopping, or cancelled: nothing is written here, and the record comes again to whoever owns it.
                owned.tracker.release(record.offset)
                self._spans.end(span)
                release()
        if completion is not None:
            self._committer.submit(completion)

    def _start_span(self, record: InRecord, envelope: Envelope, epoch: int, attempt: int) -> Span:
        creator = tracing.extract(list(record.headers))
        return self._spans.start(
            names.SPAN_PROCESS,
            kind=SpanKind.CONSUMER,
            parent=creator,
            links=tracing.link_to(creator, is_parent=True),
            attributes={
                names.MESSAGING_SYSTEM: names.SYSTEM_KAFKA,
                names.MESSAGING_OPERATION_NAME: "process",
                names.MESSAGING_OPERATION_TYPE: "process",
                names.MESSAGING_DESTINATION_NAME: record.topic,
                names.MESSAGING_DESTINATION_PARTITION_ID: str(record.partition),
                names.MESSAGING_CONSUMER_GROUP_NAME: self._section.group_id,
                names.MESSAGING_KAFKA_OFFSET: record.offset,
                names.MESSAGING_KAFKA_MESSAGE_TOMBSTONE: record.value is None,
                names.MESSAGING_MESSAGE_BODY_SIZE: len(record.value or b""),
                names.REQUEST_ID: envelope.request_id,
                names.LABEL: envelope.label,
                names.EPOCH: epoch,
                names.ATTEMPT: attempt,
            },
        )

    async def _run(
        self, record: InRecord, envelope: Envelope, owned: OwnedPartition, attempt: int, span: Span
    ) -> Ending | None:
        """The ending; None when the record is to be given back."""
        stage: Stage = "decode"
        label = envelope.label
        try:
            read = read_prompt(record, trust_tenant=self._section.trusted_tenant_header)
            label = read.prompt.label
            if read.conversation_id:
                span.set_attribute(names.MESSAGING_MESSAGE_CONVERSATION_ID, read.conversation_id)
            stage = "admit"
            call = Call(
                request_id=envelope.request_id,
                transport=TRANSPORT,
                parent=tracing.context_of(span),
                tenant=read.tenant,
                deadline_ns=self._deadline_ns(read.deadline_wall_ns),
                waits=True,
                source=envelope.source,
                epoch=owned.epoch,
                attempt=attempt,
            )
            stream = await self._start(read.prompt, call)
            stage = "generate"
            return await self._follow(stream, envelope, owned, call, label, span)
        except RequestError as error:
            return None if error.code == "draining" else Ending(event=None, error=error, stage=stage, label=label)
        except Exception as error:  # noqa: BLE001 - the per-message boundary: one record never ends the transport
            _log.error("a record failed", request_id=envelope.request_id, error=type(error).__name__, where=_where(error))
            fault = RequestError("internal", "a fault of Sluice; the log has this request")
            return Ending(event=None, error=fault, stage=stage, label=label)

    def _deadline_ns(self, deadline_wall_ns: int) -> int:
        if not deadline_wall_ns:
            return 0
        remaining_ns = deadline_wall_ns - self._wall_ns()
        if remaining_ns <= 0:
            raise RequestError("deadline_exceeded", "the deadline had passed before the prompt was taken")
        return self._monotonic_ns() + remaining_ns

    async def _start(self, prompt: PromptRequest, call: Call) -> EventStream:
        """A durable prompt is never refused for want of room: it waits until there is some, or until its deadline."""
        while True:
            # Nothing is awaited between this and the start, from when on the generation itself can be cancelled.
            if self._cancels.includes(call.request_id):
                raise RequestError("cancelled", CODES["cancelled"].meaning)
            try:
                return await self._generation.start(prompt, call)
            except RequestError as error:
                if error.code not in ("overloaded", "quota_exceeded"):
                    raise
                await asyncio.sleep(min(max(error.retry_after_s, _RETRY_MIN_S), _RETRY_MAX_S))

    async def _follow(
        self, stream: EventStream, envelope: Envelope, owned: OwnedPartition, call: Call, label: str, span: Span
    ) -> Ending | None:
        chunks = self._open_chunks(envelope, owned, call, span)
        model = ""
        try:
            async with aclosing(stream):
                async for event in stream:
                    if isinstance(event, Started):
                        model = event.model
                        if chunks is not None:
                            chunks.started(event)
                    elif isinstance(event, Delta):
                        if chunks is not None:
                            chunks.delta(event)
                    else:
                        error = event.error if isinstance(event, Failed) else None
                        if error is not None and error.code == "draining":
                            if chunks is not None:
                                chunks.hand_over()
                            return None
                        if chunks is not None:
                            await chunks.finish()
                            span.set_attribute(names.CHUNKS_WRITTEN, chunks.num_written)
                        return Ending(event=event, error=error, stage="generate", label=label, model=model)
        except asyncio.CancelledError:
            if chunks is not None:
                chunks.hand_over()
            raise
        except BaseException:
            if chunks is not None:
                chunks.drop()
            raise
        raise RuntimeError("a generation ended without a terminal event")

    def _open_chunks(self, envelope: Envelope, owned: OwnedPartition, call: Call, span: Span) -> ChunkStream | None:
        if self._chunks is None:
            return None
        return self._chunks.open(
            envelope.source,
            media_type=envelope.media_type,
            epoch=call.epoch,
            attempt=call.attempt,
            traceparent=tracing.traceparent(span),
            written=owned.tracker.chunks_written,
        )

    def _ended(
        self,
        record: InRecord,
        envelope: Envelope,
        owned: OwnedPartition,
        attempt: int,
        span: Span,
        ending: Ending,
        release: Callable[[], None],
    ) -> Completion:
        try:
            return self._terminal(record, envelope, owned, attempt, span, ending, release)
        except Exception as error:  # noqa: BLE001 - the per-message boundary: given back, the record would hold its partition for ever
            _log.error("a result failed", request_id=envelope.request_id, error=type(error).__name__, where=_where(error))
            fault = RequestError("internal", "a fault of Sluice; the log has this request")
            return self._terminal(
                record, envelope, owned, attempt, span, Ending(event=None, error=fault, stage="write"), release
            )

    def _terminal(
        self,
        record: InRecord,
        envelope: Envelope,
        owned: OwnedPartition,
        attempt: int,
        span: Span,
        ending: Ending,
        release: Callable[[], None],
    ) -> Completion:
        send = self._spans.start(
            names.SPAN_SEND_RESULTS,
            kind=SpanKind.PRODUCER,
            parent=tracing.context_of(span),
            attributes={
                names.MESSAGING_SYSTEM: names.SYSTEM_KAFKA,
                names.MESSAGING_OPERATION_NAME: "send",
                names.MESSAGING_OPERATION_TYPE: "send",
                names.MESSAGING_DESTINATION_NAME: self._topics.results,
                names.MESSAGING_DESTINATION_PARTITION_ID: str(record.partition),
            },
        )
        trace_headers: Headers = tuple((name, value.encode()) for name, value in tracing.inject(send))
        result = self._result(envelope, owned.epoch, attempt, ending, tracing.trace_id(span))
        written, result, misfit = self._fitting(envelope, result, trace_headers)
        error = misfit or ending.error
        stage = ending.stage if misfit is None else "write"

        def letter(max_bytes: int) -> tuple[OutRecord, ...]:
            if error is None or not error.info.dead_letter:
                return ()
            return (
                dead_letter(
                    self._topics.dead_letters,
                    record,
                    error,
                    stage=stage,
                    attempts=attempt,
                    time_ns=self._wall_ns(),
                    max_bytes=max_bytes,
                    trace_headers=trace_headers,
                ),
            )

        def smaller(num_durable: int) -> tuple[OutRecord, ...]:
            nonlocal error, stage, result
            if num_durable:
                # The result stands; its letter is what the broker does not take.
                return letter(0)
            result, error = too_large(result)
            stage = "write"
            return (
                result_record(self._topics.results, envelope, result, trace_headers),
                *letter(self._section.max_result_bytes),
            )

        def settled(durable: bool) -> None:
            if durable and self._chunks is not None and self._chunks.listener is not None:
                self._chunks.listener.ended(envelope.source, result)
            self._spans.end(send)
            if durable and error is not None:
                tracing.record_error(span, error.code)
                if error.info.dead_letter:
                    self._metrics.dead_letter(error.code)

        records = (written, *letter(self._section.max_result_bytes))
        return self._completion(owned, record, records, smaller, settled, span, release)

    def _result(self, envelope: Envelope, epoch: int, attempt: int, ending: Ending, trace_id: str) -> inference_pb2.Result:
        if ending.event is not None:
            return wire.result_to_proto(
                ending.event,
                request_id=envelope.request_id,
                time_ns=self._wall_ns(),
                label=ending.label,
                model=ending.model,
                source=envelope.source,
                epoch=epoch,
                attempt=attempt,
            )
        assert ending.error is not None
        return wire.refusal_to_proto(
            ending.error,
            request_id=envelope.request_id,
            time_ns=self._wall_ns(),
            label=ending.label,
            model=ending.model,
            trace_id=trace_id,
            source=envelope.source,
            epoch=epoch,
            attempt=attempt,
        )

    def _fitting(
        self, envelope: Envelope, result: inference_pb2.Result, trace_headers: Headers
    ) -> tuple[OutRecord, inference_pb2.Result, RequestError | None]:
        """The result within the limit and its record: whole, without logprobs, or as `result_too_large`."""
        for candidate in (result, without_logprobs(result)):
            # Neither form is smaller than the binary one: what cannot fit is not spelled out, which would hold up the loop.
            if candidate.ByteSize() > self._section.max_result_bytes:
                continue
            written = result_record(self._topics.results, envelope, candidate, trace_headers)
            if written.num_bytes <= self._section.max_result_bytes:
                return written, candidate, None
        shrunk, error = too_large(result)
        return result_record(self._topics.results, envelope, shrunk, trace_headers), shrunk, error

    def _completion(
        self,
        owned: OwnedPartition,
        record: InRecord,
        records: tuple[OutRecord, ...],
        replacement: Callable[[int], tuple[OutRecord, ...]],
        settled: Callable[[bool], None],
        span: Span,
        release: Callable[[], None],
    ) -> Completion:
        def end(durable: bool) -> None:
            if not durable:
                owned.tracker.release(record.offset)
            settled(durable)
            self._spans.end(span)
            release()

        return Completion(owned=owned, offset=record.offset, records=records, replacement=replacement, settled=end)


def _where(error: BaseException) -> str:
    """The innermost frame of an exception: never its message, which could hold a caller's text."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f"{trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno}"
