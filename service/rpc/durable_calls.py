"""The methods for durable requests: `Submit`, `Attach`, `Get`, and `Cancel` of an id that Kafka knows.

Guarantees: `Submit` answers once its record is acknowledged; `Attach` ends with its reader and never ends the request; its SERVER
span links to the generation's. Without Kafka they say so. Knows Kafka by the `Durable` seam alone.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol

from google.protobuf.message import Message
from opentelemetry.trace import Span, SpanKind

from engine.request import MAX_CHOICES
from schemas.v1 import inference_pb2
from service import wire
from service.config import GrpcSection
from service.contract import Failed, Finished, PromptRequest, ReaderEvent, Source
from service.errors import CODES, RequestError
from service.resolution import check_sampling
from service.rpc import calls
from service.rpc.pump import Pump
from service.telemetry import names, tracing
from service.wire_limits import UINT32_MAX, invalid

MAX_ID_BYTES = 512

Context = Any  # grpc.aio.ServicerContext[bytes, Message]; grpc ships no types
Pumped = Callable[[Pump, AsyncIterator[ReaderEvent], Span, str], Awaitable[Finished | Failed]]


class NotServed(Exception):
    """This replica has no Kafka to serve the call with."""


class AttachedStream(Protocol):
    """A reader of a durable request. Closing it ends the reading alone."""

    @property
    def traceparent(self) -> str: ...

    @property
    def here(self) -> bool:
        """Whether the request runs on this replica."""
        ...

    def __aiter__(self) -> AsyncIterator[ReaderEvent]: ...

    async def aclose(self) -> None: ...


class Durable(Protocol):
    """Durable requests: `service/kafka/durable.py`, or a fake of it. All raise `RequestError`."""

    def owns(self, request_id: str) -> bool: ...

    async def submit(
        self,
        prompt: PromptRequest,
        *,
        key: str,
        queue_class: str,
        conversation_id: str,
        headers: tuple[tuple[str, bytes], ...],
    ) -> Source: ...

    async def get(self, request_id: str) -> inference_pb2.Result: ...

    async def attach(self, request_id: str, after: Sequence[int], after_text: Sequence[int]) -> AttachedStream: ...

    async def cancel(self, request_id: str) -> bool: ...


class DurableCalls:
    """Handlers; `pumped` runs a pump with the servicer's own bounds and counts."""

    def __init__(
        self,
        section: GrpcSection,
        durable: Durable | None,
        *,
        spans: tracing.Tracing,
        pumped: Pumped,
        draining: Callable[[], bool],
        wall_ns: Callable[[], int],
    ) -> None:
        self._section = section
        self._durable = durable
        self._spans = spans
        self._pumped = pumped
        self._draining = draining
        self._wall_ns = wall_ns
        self._attached: dict[Pump, AttachedStream] = {}

    def owns(self, request_id: str) -> bool:
        """Whether this id is a durable request's."""
        return self._durable is not None and self._durable.owns(request_id)

    def drain(self) -> None:
        """Readers of what runs elsewhere can be served elsewhere, at once."""
        for pump, stream in self._attached.items():
            if not stream.here:
                pump.hand_over()

    async def submit(self, raw: bytes, context: Context, span: Span) -> Message:
        """`Submit`."""
        durable = self._served()
        request = calls.parse(inference_pb2.SubmitRequest, raw)
        if self._draining():
            raise RequestError("draining", CODES["draining"].meaning)
        metadata = calls.text_headers(context.invocation_metadata())
        prompt = calls.labelled(wire.prompt_from_proto(request.prompt), metadata)
        check_sampling(prompt.sampling)
        headers = calls.record_headers(
            prompt, metadata, trusted_tenant=self._section.trusted_tenant_metadata, wall_ns=self._wall_ns()
        )
        send = self._spans.start(
            names.SPAN_SEND_PROMPTS,
            kind=SpanKind.PRODUCER,
            parent=tracing.context_of(span),
            attributes={names.MESSAGING_SYSTEM: names.SYSTEM_KAFKA, names.MESSAGING_OPERATION_TYPE: "send"},
        )
        try:
            trace = tuple((key, value.encode()) for key, value in tracing.inject(send))
            source = await durable.submit(
                prompt,
                key=request.key,
                queue_class=request.queue_class,
                conversation_id=metadata.get(calls.CONVERSATION_ID, ""),
                headers=(*headers, *trace),
            )
        finally:
            self._spans.end(send)
        span.set_attributes({names.REQUEST_ID: source.request_id, names.LABEL: prompt.label})
        await context.send_initial_metadata(_echo(span, source.request_id))
        return inference_pb2.SubmitResponse(request_id=source.request_id)

    async def get(self, raw: bytes, context: Context, span: Span) -> Message:
        """`Get`."""
        durable = self._served()
        request = calls.parse(inference_pb2.GetRequest, raw)
        return await durable.get(_named(request.request_id, span))

    async def attach(self, raw: bytes, context: Context, span: Span) -> None:
        """`Attach`."""
        durable = self._served()
        request = calls.parse(inference_pb2.AttachRequest, raw)
        request_id, after = _named(request.request_id, span), tuple(request.after_seq)
        for name, numbers in (("after_seq", after), ("after_text", request.after_text)):
            if len(numbers) > MAX_CHOICES:
                raise invalid(name, f"holds {len(numbers)} numbers; at most {MAX_CHOICES}")
        if any(count > UINT32_MAX for count in after):
            raise invalid("after_seq", f"no request says more than {UINT32_MAX} tokens a choice")
        if self._draining():
            raise RequestError("draining", CODES["draining"].meaning)
        stream = await durable.attach(request_id, after, tuple(request.after_text))
        pump = Pump(self._section, request_id, context.write, after=after)
        self._attached[pump] = stream
        try:
            await context.send_initial_metadata(_echo(span, request_id))
            end = await self._pumped(pump, aiter(stream), span, "attach again with after_seq")
        finally:
            del self._attached[pump]
            await stream.aclose()
            for link in tracing.link_to(tracing.extract([("traceparent", stream.traceparent)])):
                span.add_link(link.context)
        if isinstance(end, Failed):
            raise end.error

    async def cancel(self, request_id: str) -> bool:
        """`Cancel` of an id that this owns."""
        return await self._served().cancel(request_id)

    def _served(self) -> Durable:
        if self._durable is None:
            raise NotServed
        return self._durable


def _named(request_id: str, span: Span) -> str:
    if not request_id:
        raise RequestError("invalid_field", "must name the request", field="request_id")
    if len(request_id.encode()) > MAX_ID_BYTES:
        raise RequestError("invalid_field", f"is longer than {MAX_ID_BYTES} bytes", field="request_id")
    span.set_attribute(names.REQUEST_ID, request_id)
    return request_id


def _echo(span: Span, request_id: str) -> tuple[tuple[str, str], ...]:
    known = ((calls.REQUEST_ID, request_id), (calls.TRACE_ID, tracing.trace_id(span)))
    return tuple((key, value) for key, value in known if value and value.isascii())
