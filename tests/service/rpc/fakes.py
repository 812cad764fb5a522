"""A use case without an engine, and a gRPC service around it: deterministic tokens, paced by the test."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from opentelemetry import trace

from schemas.v1 import inference_pb2
from service.config import GrpcSection, TracingSection
from service.contract import Call, ChoiceResult, Delta, Event, Failed, Finished, PromptRequest, Started, Timings, Usage
from service.errors import RequestError
from service.health import Health
from service.rpc.server import RpcServer
from service.rpc.servicer import Inference
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import Tracing, trace_id

WAIT_S = 20.0
TIMINGS = Timings(queue_ms=1.0, ttft_ms=2.0, tpot_ms=3.0, total_ms=4.0)


def token(seed: int, choice: int, position: int) -> int:
    """What the fake says: a function of (seed, choice, position), as the product's draws are."""
    return (seed * 31 + choice * 7 + position * 13) % 1000


def word(token_id: int) -> str:
    return f"<{token_id}>"


@dataclass
class FakeStream:
    """One accepted request of the fake."""

    owner: "FakeGeneration"
    prompt: PromptRequest
    call: Call
    closed: bool = False
    ended: bool = False
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def request_id(self) -> str:
        return self.call.request_id

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._events()

    async def aclose(self) -> None:
        self.closed = True
        if not self.ended:
            self.owner.aborted.append(self.request_id)
        self.owner.changed.set()

    async def _events(self) -> AsyncIterator[Event]:
        sampling = self.prompt.sampling
        seed, total, n = sampling.seed if sampling.seed is not None else 5, sampling.max_tokens or 8, sampling.n or 1
        said = [list(ids) for ids in self.call.said] or [[] for _ in range(n)]
        texts = ["".join(word(i) for i in ids) for ids in said]
        span_trace = trace_id(trace.get_current_span(self.call.parent))
        yield Started(request_id=self.request_id, model="fake", seed=seed, prompt_tokens=3, trace_id=span_trace)
        usage = Usage(prompt_tokens=3, cached_prompt_tokens=1, completion_tokens=0)
        for position in range(total):
            for choice in range(n):
                if position < len(said[choice]):
                    continue
                if not await self.owner.permit(self):
                    self.ended = True
                    error = RequestError("cancelled", "ended by its caller")
                    yield Failed(error=error, choices=(), usage=usage, timings=TIMINGS, seed=seed, trace_id=span_trace)
                    return
                if self.owner.failure is not None and position == self.owner.fail_at:
                    self.ended = True
                    yield Failed(
                        error=self.owner.failure, choices=(), usage=usage, timings=TIMINGS, seed=seed, trace_id=span_trace
                    )
                    return
                if self.owner.crash is not None and position == self.owner.fail_at:
                    raise self.owner.crash
                said[choice].append(token(seed, choice, position))
                last = position == total - 1
                yield Delta(
                    choice=choice,
                    seq=position,
                    token_ids=(said[choice][-1],),
                    text=word(said[choice][-1]) + self.owner.padding,
                    text_offset=len(texts[choice]),
                    finish_reason="length" if last else None,
                )
                texts[choice] += word(said[choice][-1]) + self.owner.padding
        self.ended = True
        results = tuple(
            ChoiceResult(index=i, text=texts[i], token_ids=tuple(said[i]), finish_reason="length") for i in range(n)
        )
        usage = Usage(prompt_tokens=3, cached_prompt_tokens=1, completion_tokens=total * n)
        yield Finished(choices=results, usage=usage, timings=TIMINGS, seed=seed, trace_id=span_trace)


class FakeGeneration:
    """`Generations` whose tokens come when the test allows: `allow(n)` lets n more through, `free()` all."""

    def __init__(self) -> None:
        self.refusal: RequestError | Exception | None = None
        self.failure: RequestError | None = None
        self.crash: Exception | None = None
        self.fail_at = 0
        self.padding = ""
        self.streams: list[FakeStream] = []
        self.aborted: list[str] = []
        self.changed = asyncio.Event()
        self._permits = asyncio.Semaphore(0)
        self._free = True

    def hold(self) -> None:
        self._free = False

    def allow(self, count: int) -> None:
        for _ in range(count):
            self._permits.release()

    def free(self) -> None:
        self._free = True
        self.allow(10_000)

    async def permit(self, stream: FakeStream) -> bool:
        if not self._free:
            acquire = asyncio.ensure_future(self._permits.acquire())
            cancel = asyncio.ensure_future(stream.cancelled.wait())
            try:
                await asyncio.wait({acquire, cancel}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                acquire.cancel()
                cancel.cancel()
        await asyncio.sleep(0)
        return not stream.cancelled.is_set()

    async def start(self, prompt: PromptRequest, call: Call) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        stream = FakeStream(self, prompt, call)
        self.streams.append(stream)
        self.changed.set()
        return stream

    def cancel(self, request_id: str) -> bool:
        for stream in self.streams:
            if stream.request_id == request_id and not stream.ended:
                stream.cancelled.set()
                return True
        return False

    async def until(self, condition) -> None:  # type: ignore[no-untyped-def]
        """Waits, with a bound, until `condition()` holds."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@dataclass
class Service:
    """A running gRPC service around a fake."""

    generation: FakeGeneration
    health: Health
    metrics: Metrics
    tracing: Tracing
    inference: Inference
    server: RpcServer
    port: int

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def spans(self, name: str) -> list:  # type: ignore[type-arg]
        """Those of calls that are over. A caller has its status before the call's span ends: waits, with a bound, for the latter."""
        await asyncio.wait_for(self.inference.idle(), WAIT_S)
        return [span for span in self.tracing.spans() if span.name == name]


@asynccontextmanager
async def serving(generation: FakeGeneration | None = None, *, tracing: Tracing | None = None, durable=None, **settings):  # type: ignore[no-untyped-def]
    """A ready service on a free port; `settings` are fields of GrpcSection."""
    generation = generation or FakeGeneration()
    section = GrpcSection(**{"port": 0, **settings})
    spans = tracing or Tracing(TracingSection(), memory=True)
    metrics, health = Metrics(), Health()
    ids = iter(range(1, 1_000_000))
    inference = Inference(
        section,
        generation,
        spans=spans,
        metrics=metrics,
        models=lambda: [inference_pb2.Model(name="fake", context_tokens=128, ready=health.report().ready)],
        new_request_id=lambda: f"request-{next(ids)}",
        durable=durable,
    )
    server = RpcServer(section, inference, health)
    port = await server.start()
    health.engine_ready()
    service = Service(generation, health, metrics, spans, inference, server, port)
    try:
        yield service
    finally:
        await server.stop(0)
        spans.shutdown()
