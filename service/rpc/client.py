"""A small asyncio client: one call for an answer, one iterator for its tokens, whatever happens to the replica meanwhile.

Guarantees: `stream` and `attach` give each token of each choice once and in order, also when replicas are drained, restarted or
killed: a direct stream is sent again with the tokens and the seed received, a durable one is attached again after them, on the
replica that answers; the reader sees a pause. Attempts without progress are bounded. What ends a call is a `SluiceError` with the
code that the service gave. Leaving a stream ends a direct request; a durable one goes on.
"""

import asyncio
import dataclasses
import math
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from schemas.v1 import inference_pb2, inference_pb2_grpc
from service import wire
from service.contract import PromptRequest, SamplingFields
from service.rpc import calls
from service.rpc.client_errors import SluiceError, as_error, interrupted
from service.rpc.client_fold import StreamFold
from service.rpc.client_stream import Attempts, Backoff, StreamItem, TokenStream

__all__ = ["Backoff", "CallOptions", "SluiceClient", "SluiceError", "StreamItem", "TokenStream"]

Prompt = PromptRequest | str | Sequence[tuple[str, str]]

_METADATA = (
    ("traceparent", "traceparent"),
    (calls.TENANT, "tenant"),
    (calls.CONVERSATION_ID, "conversation_id"),
    (calls.CORRELATION_ID, "correlation_id"),
    (calls.IDEMPOTENCY_KEY, "idempotency_key"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """What goes beside a prompt. `timeout_s` 0: none; it spans all attempts. `traceparent`: the caller's W3C trace context."""

    timeout_s: float = 0.0
    tenant: str = ""
    conversation_id: str = ""
    correlation_id: str = ""
    traceparent: str = ""
    idempotency_key: str = ""


class _Endpoint:
    """One replica's channel."""

    def __init__(self, target: str, max_message_bytes: int) -> None:
        self.channel = grpc.aio.insecure_channel(target, options=_options(max_message_bytes))
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)


class SluiceClient:
    """Channels to `targets` (host:port, or several replicas' of one group). Use as an async context manager, or `close` it."""

    def __init__(
        self,
        targets: str | Sequence[str],
        *,
        backoff: Backoff | None = None,
        max_message_bytes: int = 4_194_304,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        names = [targets] if isinstance(targets, str) else list(targets)
        if not names:
            raise ValueError("at least one target is needed")
        self._endpoints = [_Endpoint(name, max_message_bytes) for name in names]
        self._current = 0
        self.backoff = Backoff() if backoff is None else backoff
        self.sleep, self.draw, self.clock = sleep, draw, clock

    @property
    def stub(self) -> Any:
        """The stub of the replica that is spoken to now."""
        return self._endpoints[self._current].stub

    async def __aenter__(self) -> "SluiceClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channels; open calls end."""
        for endpoint in self._endpoints:
            await endpoint.channel.close()

    async def generate(
        self, prompt: Prompt, *, sampling: SamplingFields | None = None, options: CallOptions | None = None
    ) -> inference_pb2.Result:
        """The whole answer. Raises `SluiceError`. Sent once: `stream` is the call that survives a replica."""
        options = options or CallOptions()
        request = inference_pb2.GenerateRequest(prompt=wire.prompt_to_proto(as_request(prompt, sampling)))
        try:
            answer = await self.stub.Generate(request, timeout=options.timeout_s or None, metadata=metadata(options))
        except grpc.aio.AioRpcError as error:
            raise as_error(error) from None
        return answer

    def stream(
        self, prompt: Prompt, *, sampling: SamplingFields | None = None, options: CallOptions | None = None
    ) -> TokenStream:
        """The tokens as they come: `async with client.stream(…) as events: async for event in events`."""
        asked, options, route = as_request(prompt, sampling), options or CallOptions(), _Route(self)
        began_s: float | None = None

        def open_call(fold: StreamFold, left_s: float | None) -> Any:
            nonlocal began_s
            began_s = self.clock() if began_s is None else began_s
            again, said = _rest_of_its_time(asked, self.clock() - began_s), fold.said
            if fold.seed is not None:
                again = dataclasses.replace(again, sampling=dataclasses.replace(again.sampling, seed=fold.seed))
            request = inference_pb2.StreamRequest(
                prompt=wire.prompt_to_proto(again),
                output_token_ids=[inference_pb2.TokenIds(ids=ids) for ids in said] if any(said) else (),
            )
            return route.stub().Stream(request, timeout=left_s, metadata=metadata(options))

        fold = StreamFold(asked.sampling.n or 1)
        return TokenStream(self.attempts(route, lambda error, fold: interrupted(error)), fold, open_call, options.timeout_s)

    async def submit(
        self,
        prompt: Prompt,
        *,
        sampling: SamplingFields | None = None,
        key: str = "",
        queue_class: str = "",
        options: CallOptions | None = None,
    ) -> str:
        """The request id of a durable prompt, once it is written to Kafka. Raises `SluiceError`.

        `key`: the record's; without one the conversation id, the label, or the prompt's beginning keep what shares a prefix together.
        `queue_class`: interactive, standard or batch, where the cluster has their topics.
        Where another replica is asked after a failure the prompt may be written twice: the idempotency key, which is drawn where
        none is given, says that it is the same.
        """
        options = options or CallOptions()
        if not options.idempotency_key and len(self._endpoints) > 1:
            options = dataclasses.replace(options, idempotency_key=uuid.uuid4().hex)
        asked = wire.prompt_to_proto(as_request(prompt, sampling))
        request = inference_pb2.SubmitRequest(prompt=asked, key=key, queue_class=queue_class)
        answer = await self._ask("Submit", request, options)
        return str(answer.request_id)

    def attach(self, request_id: str, after_seq: Sequence[int] = (), *, options: CallOptions | None = None) -> TokenStream:
        """A durable request's tokens from `after_seq` (tokens already read, one number a choice) on, live or past, on any replica.

        The text is what those tokens add; only where their records are gone may it begin earlier, and `text_offset` says where.
        `Finished` holds what was read here.
        """
        options, route = options or CallOptions(), _Route(self)

        def open_call(fold: StreamFold, left_s: float | None) -> Any:
            request = inference_pb2.AttachRequest(request_id=request_id, after_seq=fold.counts, after_text=fold.text_counts)
            return route.stub().Attach(request, timeout=left_s, metadata=metadata(options))

        def outlives(error: grpc.aio.AioRpcError, fold: StreamFold) -> bool:
            # What the request itself ended with is final; that this call could not go on is not.
            return not fold.failed and (interrupted(error) or as_error(error).retriable)

        return TokenStream(self.attempts(route, outlives), StreamFold(None, after_seq), open_call, options.timeout_s)

    async def get(self, request_id: str, *, options: CallOptions | None = None) -> Any:
        """The terminal record of a durable request; one with status `pending` while there is none. Raises `SluiceError`."""
        return await self._ask("Get", inference_pb2.GetRequest(request_id=request_id), options or CallOptions())

    async def cancel(self, request_id: str) -> bool:
        """Ends a request; False when it had ended. A durable one from any replica. Raises `SluiceError`."""
        answer = await self._ask("Cancel", inference_pb2.CancelRequest(request_id=request_id), CallOptions())
        return bool(answer.was_running)

    async def models(self) -> tuple[inference_pb2.Model, ...]:
        """What the replica serves. Raises `SluiceError`."""
        answer = await self._ask("Models", inference_pb2.ModelsRequest(), CallOptions())
        return tuple(answer.models)

    async def health(self) -> bool:
        """Whether a replica takes requests; the first that does is spoken to from then on. Raises `SluiceError` when none answers."""
        answered, failure = False, None
        for _ in self._endpoints:
            index = self._current
            try:
                request = health_pb2.HealthCheckRequest(service="sluice.v1.Inference")
                answer = await self._endpoints[index].health.Check(request)
            except grpc.aio.AioRpcError as error:
                failure = error
            else:
                answered = True
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return True
            self.leave(index)
        if failure is not None and not answered:
            raise as_error(failure) from None
        return False

    async def _ask(self, method: str, request: Any, options: CallOptions) -> Any:
        """One answer: of the replica that is spoken to now, else of the first other one that can give it."""
        failure: grpc.aio.AioRpcError | None = None
        for _ in self._endpoints:
            index = self._current
            call = getattr(self._endpoints[index].stub, method)
            try:
                return await call(request, timeout=options.timeout_s or None, metadata=metadata(options))
            except grpc.aio.AioRpcError as error:
                failure = error
                if not interrupted(error):
                    break
                self.leave(index)
        assert failure is not None
        raise as_error(failure) from None

    def attempts(self, route: "_Route", outlives: Callable[[grpc.aio.AioRpcError, StreamFold], bool]) -> Attempts:
        """How a stream on this client is tried again."""
        return Attempts(
            backoff=self.backoff,
            sleep=self.sleep,
            draw=self.draw,
            clock=self.clock,
            failed=route.leave,
            outlives=outlives,
        )

    def enter(self) -> tuple[int, Any]:
        """The replica that is spoken to now: its number and stub."""
        return self._current, self.stub

    def leave(self, index: int) -> None:
        """Another replica is spoken to from now on, unless somebody has left this one already."""
        if index == self._current:
            self._current = (index + 1) % len(self._endpoints)


class _Route:
    """The way of one stream's attempts over the replicas: each fails for the one that it was made on."""

    def __init__(self, client: SluiceClient) -> None:
        self._client = client
        self._index = 0

    def stub(self) -> Any:
        self._index, stub = self._client.enter()
        return stub

    def leave(self) -> None:
        self._client.leave(self._index)


def as_request(prompt: Prompt, sampling: SamplingFields | None) -> PromptRequest:
    """A text, a list of (role, content) or a whole request as a request; `sampling` replaces the request's when given."""
    if isinstance(prompt, str):
        return PromptRequest(text=prompt, sampling=sampling or SamplingFields())
    if isinstance(prompt, PromptRequest):
        return prompt if sampling is None else dataclasses.replace(prompt, sampling=sampling)
    return PromptRequest(messages=tuple(prompt), sampling=sampling or SamplingFields())


def _rest_of_its_time(asked: PromptRequest, spent_s: float) -> PromptRequest:
    """The request with what is left of its time to live, which each attempt would else begin anew. Raises `SluiceError`."""
    if not asked.ttl_ms:
        return asked
    left_ms = math.ceil(asked.ttl_ms - spent_s * 1e3)
    if left_ms <= 0:
        raise SluiceError("deadline_exceeded", "its time to live is over")
    return dataclasses.replace(asked, ttl_ms=left_ms)


def metadata(options: CallOptions) -> tuple[tuple[str, str], ...]:
    """The call's metadata. Raises `SluiceError` (`invalid_field`) that names the option which metadata cannot hold."""
    pairs = []
    for key, name in _METADATA:
        value: str = getattr(options, name)
        if not (value.isascii() and value.isprintable()):
            raise SluiceError("invalid_field", "must be printable ASCII: gRPC metadata hold nothing else", field=name)
        if value:
            pairs.append((key, value))
    return tuple(pairs)


def _options(max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # A restarting replica is back in a second or so; gRPC's own 1 s doubling to 120 s would sleep past it.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # A closed channel to a restarted server of the same address must not be shared through the global pool.
        ("grpc.use_local_subchannel_pool", 1),
        # Without these a reader that stops reading still takes about 6 MB.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 262_144),
    ]
