"""One prompt record from its bytes to its terminal records: decode, generate, chunks, result or dead letter.

Guarantees: a taken record ends in exactly one completion handed to the committer, or is given back undone (its partition was lost,
or this replica is stopping) and comes again elsewhere; `release` is called exactly once, when it is durable or given back.
The span `process prompts` covers all of it and ends when the terminal record is durable. Text enters neither logs nor spans.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Protocol

import structlog
from opentelemetry.trace import Span, SpanKind

from schemas.v1 import inference_pb2
from service import wire
from service.config import KafkaSection
from service.contract import Call, Delta, Event, Failed, PromptRequest, Started
from service.errors import CODES, RequestError
from service.kafka.cancels import Cancels
from service.kafka.chunk_records import Said
from service.kafka.chunks import ChunkStream, ChunkWriter
from service.kafka.codec import Envelope, ReadPrompt, read_prompt
from service.kafka.completion import Commits, Completion
from service.kafka.dead_letter import Stage
from service.kafka.ownership import OwnedPartition
from service.kafka.records import HEADER_IDEMPOTENCY, InRecord
from service.kafka.result_keys import ResultKeys
from service.kafka.terminal import Ending, Taken, Terminals
from service.kafka.topics import WEIGHTS, Topics
from service.telemetry import names, tracing
from service.telemetry.logging import fault
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


class PromptHandler:
    """Handles records of every partition; keeps no state between them."""

    def __init__(
        self,
        *,
        generation: Generates,
        commits: Commits,
        chunks: ChunkWriter | None,
        cancels: Cancels,
        result_keys: ResultKeys,
        topics: Topics,
        section: KafkaSection,
        spans: tracing.Tracing,
        metrics: KafkaMetrics,
        wall_ns: Callable[[], int],
        monotonic_ns: Callable[[], int],
    ) -> None:
        self._generation = generation
        self._commits = commits
        self._chunks = chunks
        self._cancels, self._result_keys = cancels, result_keys
        self._section, self._classes = section, topics.classes
        self._tenants = {topic: section.tenant_of(topic) for topic in topics.classes}
        listener = None if chunks is None else chunks.listener
        self._terminals = Terminals(
            topics, max_bytes=section.max_result_bytes, spans=spans, metrics=metrics, wall_ns=wall_ns, listener=listener
        )
        self._spans = spans
        self._metrics = metrics
        self._wall_ns, self._monotonic_ns = wall_ns, monotonic_ns

    async def handle(
        self, record: InRecord, owned: OwnedPartition, said: Said | None = None, *, release: Callable[[], None]
    ) -> None:
        """The whole life of a record that `owned.tracker` has handed out. `said`: what earlier owners had said of it."""
        attempt = said.attempt + 1 if said is not None else 2 if record.offset < owned.redelivered_below else 1
        taken = Taken(record=record, envelope=Envelope.of(record), owned=owned, attempt=attempt)
        span = self._start_span(taken, said)
        completion: Completion | None = None
        self._cancels.cover(record.timestamp)
        try:
            if record.value is None:
                completion = self._terminals.tombstone(taken, span, release)
            else:
                ending = await self._run(taken, said, span)
                if ending is not None:
                    completion = self._ended(taken, span, ending, release)
        finally:
            if completion is None:
                # Lost, stopping, or cancelled: nothing is written here, and the record comes again to whoever owns it.
                owned.tracker.release(record.offset)
                if taken.envelope.idempotency_key is not None:
                    owned.keys.settle(taken.envelope.idempotency_key, record.offset, None)
                self._spans.end(span)
                release()
        if completion is not None:
            self._commits.submit(completion)

    def _start_span(self, taken: Taken, said: Said | None) -> Span:
        record, envelope = taken.record, taken.envelope
        creator = tracing.extract(list(record.headers))
        links = tracing.link_to(creator, is_parent=True)
        if said is not None:
            links += tracing.link_to(tracing.extract([("traceparent", said.traceparent)]))
        span = self._spans.start(names.SPAN_PROCESS, kind=SpanKind.CONSUMER, parent=creator, links=links)
        if span.is_recording():
            span.set_attributes(
                {
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
                    names.EPOCH: taken.owned.epoch,
                    names.ATTEMPT: taken.attempt,
                }
            )
        return span

    async def _run(self, taken: Taken, said: Said | None, span: Span) -> Ending | None:
        """The ending; None when the record is to be given back."""
        stage: Stage = "decode"
        label = taken.envelope.label
        try:
            read = read_prompt(taken.record, trust_tenant=self._section.trusted_tenant_header)
            label = read.prompt.label
            if read.conversation_id:
                span.set_attribute(names.MESSAGING_MESSAGE_CONVERSATION_ID, read.conversation_id)
            stage = "admit"
            if (first := await self._repeated(taken)) is not None:
                return Ending(event=None, error=None, stage="write", label=label, repeats=first)
            call = self._call(taken, read, said, span)
            stream = await self._start(read.prompt, call)
            stage = "generate"
            return await self._follow(stream, taken, read.prompt, call, span)
        except RequestError as error:
            return None if error.code == "draining" else Ending(event=None, error=error, stage=stage, label=label)
        except Exception as error:  # noqa: BLE001 - the per-message boundary: one record never ends the transport
            _log.error("a record failed", request_id=taken.request_id, **fault(error))
            failure = RequestError("internal", "a fault of Sluice; the log has this request")
            return Ending(event=None, error=failure, stage=stage, label=label)

    async def _repeated(self, taken: Taken) -> inference_pb2.Result | None:
        """The finished result of an earlier prompt with the same idempotency key; None: this one is to run. Raises `RequestError`."""
        key, owned = taken.envelope.idempotency_key, taken.owned
        while key is not None and (known := await owned.keys.claim(key, taken.record.offset)) is not None:
            if known.digest != taken.envelope.prompt_digest:
                message = f"was given to another prompt before: {known.request_id}"
                raise RequestError("invalid_field", message, field=f"headers.{HEADER_IDEMPOTENCY}")
            try:
                first = await self._result_keys.result(owned.partition, known)
            except RequestError as error:
                _log.info("a repeated prompt waits for the broker", request_id=taken.request_id, code=error.code)
                await asyncio.sleep(_RETRY_MAX_S)
                continue
            if first is not None:
                self._metrics.duplicate()
                return first
            owned.keys.forget(key)
        return None

    def _call(self, taken: Taken, read: ReadPrompt, said: Said | None, span: Span) -> Call:
        """How the prompt is asked for: a continuation where something had been said. Raises `RequestError`."""
        deadline_ns = self._deadline_ns(read.deadline_wall_ns)
        if said is not None and said.crash_loop:
            raise RequestError("crash_loop", "each replica that started this prompt ended before it did")
        num_choices = read.prompt.sampling.n or 1
        resumed = said if said is not None and said.num_tokens and len(said.token_ids) == num_choices else None
        return Call(
            request_id=taken.request_id,
            transport=TRANSPORT,
            parent=tracing.context_of(span),
            tenant=read.tenant or self._tenants[taken.envelope.source.topic],
            deadline_ns=deadline_ns,
            waits=True,
            weight=WEIGHTS[self._classes.get(taken.envelope.source.topic, "standard")],
            source=taken.envelope.source,
            epoch=taken.owned.epoch,
            attempt=taken.attempt,
            said=() if resumed is None else tuple(map(tuple, resumed.token_ids)),
            said_logprobs=() if resumed is None else tuple(map(wire.logprobs_from_proto, resumed.logprobs)),
            seed=None if resumed is None else resumed.seed,
        )

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

    async def _follow(self, stream: EventStream, taken: Taken, prompt: PromptRequest, call: Call, span: Span) -> Ending | None:
        chunks = self._open_chunks(taken, prompt, call, span)
        label = prompt.label
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
                            self._hand_over(chunks)
                            return None
                        if chunks is not None:
                            await chunks.finish()
                            span.set_attribute(names.CHUNKS_WRITTEN, chunks.num_written)
                        return Ending(event=event, error=error, stage="generate", label=label, model=model)
        except asyncio.CancelledError:
            self._hand_over(chunks)
            raise
        except BaseException:
            if chunks is not None:
                chunks.drop()
            raise
        raise RuntimeError("a generation ended without a terminal event")

    def _hand_over(self, chunks: ChunkStream | None) -> None:
        self._metrics.handed_over()
        if chunks is not None:
            chunks.hand_over()

    def _open_chunks(self, taken: Taken, prompt: PromptRequest, call: Call, span: Span) -> ChunkStream | None:
        if self._chunks is None:
            return None
        return self._chunks.open(
            taken.envelope.source,
            media_type=taken.envelope.media_type,
            epoch=call.epoch,
            attempt=call.attempt,
            traceparent=tracing.traceparent(span),
            resume_from=tuple(map(len, call.said)) or (0,) * (prompt.sampling.n or 1),
            written=taken.owned.tracker.chunks_written,
        )

    def _ended(self, taken: Taken, span: Span, ending: Ending, release: Callable[[], None]) -> Completion:
        try:
            return self._terminals.completion(taken, span, ending, release)
        except Exception as error:  # noqa: BLE001 - the per-message boundary: given back, the record would hold its partition for ever
            _log.error("a result failed", request_id=taken.request_id, **fault(error))
            failure = RequestError("internal", "a fault of Sluice; the log has this request")
            return self._terminals.completion(taken, span, Ending(event=None, error=failure, stage="write"), release)
