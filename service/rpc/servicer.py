"""The methods of `sluice.v1.Inference`: each reads its call, asks the one use case, and writes what comes back.

Guarantees: an accepted request ends with its call (unless `detach`), however the call ends; nothing that an exception says reaches
a client; every call has a SERVER span, also refused, cancelled and malformed ones. `Stream` writes its terminal event and, for a
failure, ends with the matching status too. Requests arrive as bytes, so that what does not parse is answered by us.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol

import grpc
import structlog
from google.protobuf.message import Message
from opentelemetry.trace import Span, SpanKind

from schemas.v1 import inference_pb2
from service import wire
from service.config import GrpcSection
from service.contract import Call, Event, Failed, Finished, PromptRequest, ReaderEvent, Started
from service.errors import CODES, RequestError
from service.rpc import calls
from service.rpc.durable_calls import Durable, DurableCalls, NotServed
from service.rpc.pump import HandedOver, Pump, SlowReader
from service.rpc.status import grpc_code, trailers
from service.telemetry import names, tracing
from service.telemetry.logging import fault
from service.telemetry.metrics import Metrics

_ABORT_TIMEOUT_S = 2.0
_log = structlog.get_logger("service.rpc")

Context = Any  # grpc.aio.ServicerContext[bytes, Message]; grpc ships no types
Handler = Callable[[bytes, Context, Span], Awaitable[Message | None]]


class EventStream(Protocol):
    """An accepted request. Closing it before its terminal event aborts the request."""

    @property
    def request_id(self) -> str: ...

    def __aiter__(self) -> AsyncIterator[Event]: ...

    async def aclose(self) -> None: ...


class Generations(Protocol):
    """The use case: `service/generation.py`, or a fake of it."""

    async def start(self, prompt: PromptRequest, call: Call) -> EventStream: ...

    def cancel(self, request_id: str) -> bool: ...


class Inference:
    """The service's handlers, and the streams that run in them."""

    def __init__(
        self,
        section: GrpcSection,
        generations: Generations,
        *,
        spans: tracing.Tracing,
        metrics: Metrics,
        models: Callable[[], Sequence[inference_pb2.Model]],
        new_request_id: Callable[[], str],
        durable: Durable | None = None,
        wall_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._section = section
        self._generations = generations
        self._spans = spans
        self._metrics = metrics
        self._models = models
        self._new_request_id = new_request_id
        self._wall_ns, self._monotonic_ns = wall_ns, monotonic_ns
        self._pumps: set[Pump] = set()
        self._durable = DurableCalls(
            section, durable, spans=spans, pumped=self._pumped, draining=lambda: self._draining, wall_ns=wall_ns
        )
        self._detached: set[asyncio.Task[None]] = set()
        self._draining = False
        self._num_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a server registers."""
        unary = {
            "Generate": self._generate,
            "Submit": self._durable.submit,
            "Get": self._durable.get,
            "Cancel": self._cancel,
            "Models": self._list_models,
        }
        table = {name: self._unary(name, handler) for name, handler in unary.items()}
        table["Stream"] = self._streaming("Stream", self._stream)
        table["Attach"] = self._streaming("Attach", self._durable.attach)
        return grpc.method_handlers_generic_handler(names.RPC_SERVICE, table)

    def drain(self) -> None:
        """From now on new prompts are refused with `draining`; what runs goes on."""
        self._draining = True
        self._durable.drain()

    async def idle(self) -> None:
        """Returns once no call runs. (Health watches do not count: they never end by themselves.)"""
        await self._idle.wait()

    async def done(self) -> None:
        """Returns once no call runs and nothing runs detached."""
        while self._num_calls or self._detached:
            await self._idle.wait()
            if self._detached:
                await asyncio.wait(tuple(self._detached))

    def hand_over(self) -> None:
        """Ends every open stream: its reader is told how far it got and that another replica can go on (`draining`)."""
        for pump in self._pumps:
            pump.hand_over()

    async def close(self) -> None:
        """Ends what still runs detached."""
        detached = tuple(self._detached)
        for running in detached:
            running.cancel()
        await asyncio.gather(*detached, return_exceptions=True)

    def _unary(self, method: str, handler: Handler) -> grpc.RpcMethodHandler:
        async def call(raw: bytes, context: Context) -> Message | None:
            return await self._guarded(method, handler, raw, context)

        return grpc.unary_unary_rpc_method_handler(call, None, _serialize)

    def _streaming(self, method: str, handler: Handler) -> grpc.RpcMethodHandler:
        async def call(raw: bytes, context: Context) -> None:
            await self._guarded(method, handler, raw, context)

        return grpc.unary_stream_rpc_method_handler(call, None, _serialize)

    async def _guarded(self, method: str, handler: Handler, raw: bytes, context: Context) -> Message | None:
        """Runs a handler with its span; turns whatever it raises into a status without the exception's own words."""
        attributes = {names.RPC_SYSTEM_NAME: names.SYSTEM_GRPC, names.RPC_METHOD: names.rpc_span(method)}
        parent = tracing.extract(tuple(context.invocation_metadata() or ()))
        span = self._spans.start(names.rpc_span(method), parent=parent, kind=SpanKind.SERVER, attributes=attributes)
        status = grpc.StatusCode.OK
        self._num_calls += 1
        self._idle.clear()
        try:
            try:
                return await handler(raw, context, span)
            except RequestError as error:
                failure = error
            except asyncio.CancelledError:
                # The client went away, or the server stops. Re-raised: swallowing it leaks native memory (grpc #43360).
                status = grpc.StatusCode.CANCELLED
                tracing.record_error(span, "cancelled")
                raise
            except (grpc.aio.InternalError, grpc.aio.UsageError):
                # What a write raises once the client is gone; there is nobody left to answer.
                status = grpc.StatusCode.CANCELLED
                tracing.record_error(span, "cancelled")
                return None
            except NotServed:
                status = grpc.StatusCode.UNIMPLEMENTED
                await context.abort(status, f"{method} needs Kafka, which this replica does not serve (kafka.enabled)")
            except Exception as error:  # noqa: BLE001 - the boundary of a call: its text must not reach the client
                _log.error("call failed", method=method, span=span, **fault(error))
                failure = RequestError("internal", CODES["internal"].meaning)
            status = grpc_code(failure)
            tracing.record_error(span, failure.code)
            await _abort(context, failure, trace_id=tracing.trace_id(span))
            return None
        finally:
            span.set_attribute(names.RPC_RESPONSE_STATUS_CODE, status.name)
            self._spans.end(span)
            self._num_calls -= 1
            if not self._num_calls:
                self._idle.set()

    async def _begin(
        self, prompt_message: inference_pb2.Prompt, context: Context, span: Span, stream: inference_pb2.StreamRequest | None
    ) -> tuple[PromptRequest, EventStream]:
        try:
            if self._draining:
                raise RequestError("draining", CODES["draining"].meaning)
            headers = calls.text_headers(context.invocation_metadata())
            prompt = calls.labelled(wire.prompt_from_proto(prompt_message), headers)
            detached = stream is not None and stream.detach
            call = calls.build(
                prompt,
                headers,
                request_id=self._new_request_id(),
                parent=tracing.context_of(span),
                remaining_s=None if detached else context.time_remaining(),
                trusted_tenant=self._section.trusted_tenant_metadata,
                monotonic_ns=self._monotonic_ns(),
                wall_ns=self._wall_ns(),
                said=() if stream is None else calls.continuation(stream, prompt),
            )
        except RequestError as error:
            self._metrics.requests.refused(transport="grpc", code=error.code)
            raise
        span.set_attributes({names.REQUEST_ID: call.request_id, names.LABEL: prompt.label})
        if call.tenant:
            span.set_attribute(names.TENANT, tracing.hashed(call.tenant))
        if calls.CONVERSATION_ID in headers:
            span.set_attribute(names.GEN_AI_CONVERSATION_ID, headers[calls.CONVERSATION_ID])
        running = await self._generations.start(prompt, call)
        echoed = {calls.REQUEST_ID: call.request_id, calls.TRACE_ID: tracing.trace_id(span)}
        echoed |= {key: headers[key] for key in (calls.CORRELATION_ID,) if key in headers}
        try:
            # The engine, on its own core, hears of it first.
            await asyncio.sleep(0)
            await context.send_initial_metadata(tuple((key, value) for key, value in echoed.items() if value))
        except BaseException:
            await running.aclose()
            raise
        return prompt, running

    async def _generate(self, raw: bytes, context: Context, span: Span) -> Message:
        request = calls.parse(inference_pb2.GenerateRequest, raw)
        prompt, running = await self._begin(request.prompt, context, span, None)
        model = prompt.model
        try:
            async for event in running:
                if isinstance(event, Started):
                    model = event.model
                elif isinstance(event, Failed):
                    raise event.error
                elif isinstance(event, Finished):
                    return wire.result_to_proto(
                        event, request_id=running.request_id, time_ns=self._wall_ns(), label=prompt.label, model=model
                    )
        finally:
            await running.aclose()
        raise RuntimeError("the generation ended without a terminal event")

    async def _stream(self, raw: bytes, context: Context, span: Span) -> None:
        request = calls.parse(inference_pb2.StreamRequest, raw)
        _, running = await self._begin(request.prompt, context, span, request)
        pump = Pump(self._section, running.request_id, context.write)
        ended = False
        try:
            end = await self._pumped(pump, aiter(running), span, "send them back in output_token_ids, with the seed, to go on")
            ended = True
            if isinstance(end, Failed):
                raise end.error
        finally:
            span.set_attribute(names.DETACHED, request.detach)
            if request.detach and not ended:
                self._run_detached(running)
            else:
                await running.aclose()

    async def _pumped(self, pump: Pump, events: AsyncIterator[ReaderEvent], span: Span, to_go_on: str) -> Finished | Failed:
        """Runs a pump, counted and open to a hand-over. `to_go_on`: what a reader that was cut off can do."""
        self._pumps.add(pump)
        self._metrics.streams.opened()
        try:
            return await pump.run(events)
        except SlowReader:
            self._metrics.streams.slow_reader()
            raise RequestError(
                "overloaded",
                f"the reader took nothing for {self._section.slow_reader_timeout_s:g} s and the stream was ended after "
                f"{pump.num_tokens_sent} tokens; {to_go_on}",
            ) from None
        except HandedOver:
            raise RequestError(
                "draining", f"this replica is stopping; {pump.num_tokens_sent} tokens were sent, another replica can go on"
            ) from None
        finally:
            self._pumps.discard(pump)
            self._metrics.streams.closed(messages=pump.num_messages, merges=pump.num_merges)
            span.set_attributes({names.MESSAGES_SENT: pump.num_messages, names.HEARTBEATS_SENT: pump.num_heartbeats})

    def _run_detached(self, running: EventStream) -> None:
        task = asyncio.create_task(_read_out(running), name=f"detached-{running.request_id}")
        self._detached.add(task)
        task.add_done_callback(self._detached.discard)

    async def _cancel(self, raw: bytes, context: Context, span: Span) -> Message:
        request = calls.parse(inference_pb2.CancelRequest, raw)
        if not request.request_id:
            raise RequestError("invalid_field", "must name the request", field="request_id")
        span.set_attribute(names.REQUEST_ID, request.request_id[: calls.MAX_HEADER_BYTES])
        if self._durable.owns(request.request_id):
            return inference_pb2.CancelResponse(was_running=await self._durable.cancel(request.request_id))
        return inference_pb2.CancelResponse(was_running=self._generations.cancel(request.request_id))

    async def _list_models(self, raw: bytes, context: Context, span: Span) -> Message:
        calls.parse(inference_pb2.ModelsRequest, raw)
        return inference_pb2.ModelsResponse(models=self._models())


async def _read_out(running: EventStream) -> None:
    """Reads a stream whose client has gone to its end, which keeps the generation alive."""
    try:
        async for _ in running:
            pass
    finally:
        await running.aclose()


async def _abort(context: Context, error: RequestError, *, trace_id: str) -> None:
    details = trailers(error, trace_id=trace_id)
    try:
        # Behind a reader that takes nothing the status waits as the data does: it is queued, and nobody waits for it.
        async with asyncio.timeout(_ABORT_TIMEOUT_S):
            await context.abort(grpc_code(error), str(error), trailing_metadata=details)
    except TimeoutError:
        return


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
