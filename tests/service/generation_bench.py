"""A `Generation` over a fake engine, and everything around it, for tests."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan

from service.admission import Admission
from service.config import AdmissionSection, TracingSection
from service.contract import Call, Delta, Event, Failed, Finished, PromptRequest, SamplingFields, Started
from service.generation import Generation, GenerationStream
from service.resolution import Limits
from service.streams import Streams
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import Tracing
from service.tokenization import Tokenization
from tests.service.fake_engine import FakeEngine
from tests.service.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text).ids)


class Bench:
    """A `Generation` and everything around it."""

    def __init__(self, tokenization: Tokenization) -> None:
        self.engine = FakeEngine()
        self.streams = Streams()
        self.metrics = Metrics()
        self.tracing = Tracing(TracingSection(), memory=True)
        self.admission = Admission(AdmissionSection(max_requests=4, max_tokens=1000))
        self.generation = Generation(
            engine=self.engine,
            streams=self.streams,
            tokenization=tokenization,
            admission=self.admission,
            limits=Limits(model="tiny", max_tokens_cap=50, max_prompt_bytes=2000),
            tracing=self.tracing,
            metrics=self.metrics.requests,
            draw_seed=lambda: 1234,
        )
        self.dispatch = asyncio.create_task(self.streams.run(self.engine.outputs()))

    async def start(self, text: str = "hello", *, call: Call | None = None, **sampling: object) -> GenerationStream:
        prompt = PromptRequest(text=text, sampling=SamplingFields(**sampling))  # type: ignore[arg-type]
        return await self.generation.start(prompt, call or a_call())

    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.tracing.spans()}


def a_call(request_id: str = "r", **changes: object) -> Call:
    return replace(Call(request_id=request_id, transport="grpc", parent=Context()), **changes)  # type: ignore[arg-type]


async def collect(stream: GenerationStream) -> list[Event]:
    async with asyncio.timeout(10):
        events = [event async for event in stream]
    assert isinstance(events[0], Started)
    assert [isinstance(event, Finished | Failed) for event in events].count(True) == 1
    assert isinstance(events[-1], Finished | Failed)
    return events


async def finished(stream: GenerationStream) -> Finished:
    end = (await collect(stream))[-1]
    assert isinstance(end, Finished)
    return end


async def failed(stream: GenerationStream) -> Failed:
    end = (await collect(stream))[-1]
    assert isinstance(end, Failed)
    return end


async def until_text(stream: GenerationStream, text: str) -> None:
    seen = ""
    async with asyncio.timeout(10):
        async for event in stream:
            seen += event.text if isinstance(event, Delta) else ""
            if seen == text:
                return
    raise AssertionError(f"the stream ended with {seen!r}")


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the state that is waited for has no event, and tests add none to it
            await asyncio.sleep(0)
