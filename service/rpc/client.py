"""A small asyncio client: one call for an answer, one iterator for its tokens, whatever happens to the replica meanwhile.

Guarantees: `stream` gives each token of each choice once and in order, also when the replica is drained, restarted or killed: the
prompt is sent again with the tokens and the seed received, and the reader sees a pause. Attempts without progress are bounded.
What ends a call is a `SluiceError` with the code that the service gave. Closing a stream (or leaving its block) ends the request.
"""

import asyncio
import contextlib
import dataclasses
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from schemas.v1 import inference_pb2, inference_pb2_grpc
from service import wire
from service.contract import Delta, Finished, PromptRequest, SamplingFields, Started
from service.rpc import calls
from service.rpc.client_errors import SluiceError, as_error, interrupted
from service.rpc.client_fold import ProtocolError, StreamFold

__all__ = ["Backoff", "CallOptions", "SluiceClient", "SluiceError", "TokenStream"]

Prompt = PromptRequest | str | Sequence[tuple[str, str]]
StreamItem = Started | Delta | Finished

_SETTLE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """What goes beside a prompt. `timeout_s` 0: none; it spans all attempts. `traceparent`: the caller's W3C trace context."""

    timeout_s: float = 0.0
    tenant: str = ""
    conversation_id: str = ""
    correlation_id: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Waits between attempts: doubling from `first_s` to `most_s`, each drawn from its upper half; `attempts` without progress end it."""

    first_s: float = 0.1
    most_s: float = 5.0
    attempts: int = 10

    def wait_s(self, failures: int, draw: float) -> float:
        """Seconds before attempt `failures` + 1; `draw` in [0, 1)."""
        return float(min(self.most_s, self.first_s * 2 ** (failures - 1))) * (0.5 + draw / 2)


class SluiceClient:
    """One channel to `target` (host:port). Use as an async context manager, or `close` it."""

    def __init__(
        self,
        target: str,
        *,
        backoff: Backoff | None = None,
        max_message_bytes: int = 4_194_304,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._channel = grpc.aio.insecure_channel(target, options=_options(max_message_bytes))
        self.stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self.backoff = Backoff() if backoff is None else backoff
        self.sleep, self.draw, self.clock = sleep, draw, clock

    async def __aenter__(self) -> "SluiceClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channel; open calls end."""
        await self._channel.close()

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
    ) -> "TokenStream":
        """The tokens as they come: `async with client.stream(…) as events: async for event in events`."""
        return TokenStream(self, as_request(prompt, sampling), options or CallOptions())

    async def cancel(self, request_id: str) -> bool:
        """Ends a request; False when it had ended or is not known. Raises `SluiceError`."""
        try:
            answer = await self.stub.Cancel(inference_pb2.CancelRequest(request_id=request_id))
        except grpc.aio.AioRpcError as error:
            raise as_error(error) from None
        return bool(answer.was_running)

    async def models(self) -> tuple[inference_pb2.Model, ...]:
        """What the replica serves. Raises `SluiceError`."""
        try:
            answer = await self.stub.Models(inference_pb2.ModelsRequest())
        except grpc.aio.AioRpcError as error:
            raise as_error(error) from None
        return tuple(answer.models)

    async def health(self) -> bool:
        """Whether the replica takes requests. Raises `SluiceError` when it does not answer."""
        try:
            answer = await self._health.Check(health_pb2.HealthCheckRequest(service="sluice.v1.Inference"))
        except grpc.aio.AioRpcError as error:
            raise as_error(error) from None
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class TokenStream:
    """An async iterator of `Started`, `Delta`s and, last, `Finished`. One reader. Raises `SluiceError`."""

    def __init__(self, client: SluiceClient, prompt: PromptRequest, options: CallOptions) -> None:
        self._client = client
        self._prompt = prompt
        self._options = options
        self._fold = StreamFold(prompt.sampling.n or 1)
        self._call: Any = None
        self._failures = 0
        self._until = client.clock() + options.timeout_s if options.timeout_s else 0.0
        self._ended = False
        self.num_resumes = 0
        """How often the stream was taken up again."""

    @property
    def request_id(self) -> str:
        """The id that the service gave the present attempt; "" before it was accepted. What `cancel` takes."""
        return self._fold.request_id

    def __aiter__(self) -> "TokenStream":
        return self

    async def __anext__(self) -> StreamItem:
        while not self._ended:
            try:
                if self._call is None:
                    self._call = self._open()
                message = await self._call.read()
                if message is grpc.aio.EOF:
                    # A stream that ends well has said so before; read() has raised for one that ends otherwise.
                    raise SluiceError("internal", "the stream ended without a result", retriable=True)
                item = self._fold.take(message)
            except ProtocolError as error:
                await self.aclose()
                raise SluiceError("internal", str(error)) from None
            except grpc.aio.AioRpcError as error:
                await self._again_or_raise(error)
                continue
            except SluiceError:
                await self.aclose()
                raise
            if item is None:
                continue
            self._failures = 0
            if isinstance(item, Finished):
                self._ended = True
                await self._settle()
            return item
        raise StopAsyncIteration

    async def _settle(self) -> None:
        """Takes the status that follows the result: a call that is left before it counts as cancelled on the service's side."""
        call, self._call = self._call, None
        with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                await call.read()

    def _open(self) -> Any:
        prompt, said = self._prompt, self._fold.said
        resuming = any(said)
        if self._fold.seed is not None:
            prompt = dataclasses.replace(prompt, sampling=dataclasses.replace(prompt.sampling, seed=self._fold.seed))
        request = inference_pb2.StreamRequest(
            prompt=wire.prompt_to_proto(prompt),
            output_token_ids=[inference_pb2.TokenIds(ids=ids) for ids in said] if resuming else (),
        )
        left = self._until - self._client.clock() if self._until else None
        if left is not None and left <= 0:
            raise SluiceError("deadline_exceeded", "the time for this call is over")
        return self._client.stub.Stream(request, timeout=left, metadata=metadata(self._options))

    async def _again_or_raise(self, error: grpc.aio.AioRpcError) -> None:
        self._call = None
        failure = as_error(error)
        self._failures += 1
        if not interrupted(error) or self._failures >= self._client.backoff.attempts:
            self._ended = True
            raise failure from None
        wait_s = max(failure.retry_after_s, self._client.backoff.wait_s(self._failures, self._client.draw()))
        if self._until and self._client.clock() + wait_s >= self._until:
            self._ended = True
            raise failure from None
        self.num_resumes += 1
        await self._client.sleep(wait_s)

    async def aclose(self) -> None:
        """Ends the request if it still runs; idempotent."""
        self._ended = True
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    async def __aenter__(self) -> "TokenStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def as_request(prompt: Prompt, sampling: SamplingFields | None) -> PromptRequest:
    """A text, a list of (role, content) or a whole request as a request; `sampling` replaces the request's when given."""
    if isinstance(prompt, str):
        return PromptRequest(text=prompt, sampling=sampling or SamplingFields())
    if isinstance(prompt, PromptRequest):
        return prompt if sampling is None else dataclasses.replace(prompt, sampling=sampling)
    return PromptRequest(messages=tuple(prompt), sampling=sampling or SamplingFields())


def metadata(options: CallOptions) -> tuple[tuple[str, str], ...]:
    """The call's metadata."""
    pairs = (
        ("traceparent", options.traceparent),
        (calls.TENANT, options.tenant),
        (calls.CONVERSATION_ID, options.conversation_id),
        (calls.CORRELATION_ID, options.correlation_id),
    )
    return tuple((key, value) for key, value in pairs if value)


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
