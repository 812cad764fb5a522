"""The whole picture in a real Jaeger: from the producer's span over a real broker to the result record, and the calls that fail.

The engine is the stand-in; the tokenizer and the chat template are the real model's.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from opentelemetry.trace import SpanKind

from service.app import App
from service.config import TracingSection
from service.contract import PromptRequest, SamplingFields
from service.rpc.client import CallOptions, SluiceClient, SluiceError
from service.telemetry import names, tracing
from service.telemetry.tracing import Tracing
from tests.integration.app_harness import app_of, settings
from tests.integration.kafka_harness import Broker, eventually
from tests.servers.jaeger import JaegerServer, Span, parent_of, tags
from tests.servers.model import model_dir

pytestmark = [pytest.mark.jaeger, pytest.mark.kafka, pytest.mark.model]

MODEL = "SmolLM2-135M-Instruct"
CHAT = names.chat_span(MODEL)
STREAM = names.rpc_span("Stream")
QUESTION = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "sampling": {"max_tokens": 8, "seed": 1},
}


@pytest.fixture
def producer(jaeger_server: JaegerServer) -> Tracing:
    """The client's own spans."""
    return Tracing(TracingSection(otlp_endpoint=jaeger_server.otlp_endpoint, service_name="producer"))


@pytest.fixture
async def app(jaeger_server: JaegerServer, topics_of_its_own: Broker) -> AsyncIterator[App]:
    config = settings(
        model_dir(),
        broker=topics_of_its_own,
        engine={"stand_in_tokens_per_s": 50.0},
        tracing={"otlp_endpoint": jaeger_server.otlp_endpoint},
    )
    async with app_of(config) as app:
        await eventually(lambda: app.core.health.report().state == "ready")
        yield app


async def published(
    broker: Broker, producer: Tracing, prompt: dict[str, Any], **headers: bytes
) -> tuple[str, Any, dict[str, Any]]:
    """(trace id, result record, result) of a prompt whose producer has a span."""
    span = producer.start(names.SPAN_SEND_PROMPTS, kind=SpanKind.PRODUCER)
    carried = {key: value.encode() for key, value in tracing.inject(span)} | headers
    await broker.publish(json.dumps(prompt).encode(), headers=carried)
    producer.end(span)
    (record,) = await broker.read(broker.topics.results, count=1)
    return tracing.trace_id(span), record, json.loads(record.value())


async def trace_of(jaeger: JaegerServer, trace_id: str, wanted: set[str]) -> dict[str, Span]:
    """The spans of a trace by name, once every wanted one has arrived."""

    def complete(spans: list[Span]) -> bool:
        return wanted <= {span["operationName"] for span in spans}

    spans = await asyncio.to_thread(jaeger.fetch_trace, trace_id, until=complete, timeout_s=30.0)
    assert len({span["operationName"] for span in spans}) == len(spans), "each name once"
    return {span["operationName"]: span for span in spans}


def tree(spans: dict[str, Span]) -> dict[str, str | None]:
    """Each span's parent, by name; None for a root."""
    by_id = {span["spanID"]: name for name, span in spans.items()}
    return {name: by_id.get(parent_of(span) or "") for name, span in spans.items()}


async def test_one_trace_goes_from_the_producer_to_the_last_token_and_the_result_record(
    app: App, producer: Tracing, jaeger_server: JaegerServer, topics_of_its_own: Broker
) -> None:
    trace_id, record, result = await published(topics_of_its_own, producer, QUESTION)
    expected = {
        names.SPAN_SEND_PROMPTS: None,
        names.SPAN_PROCESS: names.SPAN_SEND_PROMPTS,
        CHAT: names.SPAN_PROCESS,
        names.SPAN_QUEUE: CHAT,
        names.SPAN_PREFILL: CHAT,
        names.SPAN_DECODE: CHAT,
        names.SPAN_SEND_RESULTS: names.SPAN_PROCESS,
    }
    spans = await trace_of(jaeger_server, trace_id, set(expected))
    assert tree(spans) == expected
    assert not any("error" in tags(span) for span in spans.values())
    chat, send = tags(spans[CHAT]), spans[names.SPAN_SEND_RESULTS]
    assert (chat[names.GEN_AI_REQUEST_MODEL], chat[names.GEN_AI_USAGE_OUTPUT_TOKENS]) == (MODEL, 8)
    assert chat[names.GEN_AI_USAGE_INPUT_TOKENS] == int(result["usage"]["prompt_tokens"]) > 20
    assert chat[names.REQUEST_ID] == result["request_id"]
    assert dict(record.headers())["traceparent"].startswith(f"00-{trace_id}-{send['spanID']}-".encode())
    assert result["trace_id"] == trace_id
    (first_token,) = (
        field["value"] for log in spans[names.SPAN_DECODE]["logs"] for field in log["fields"] if field["key"] == "event"
    )
    assert first_token == names.EVENT_FIRST_TOKEN
    assert in_order(spans, names.SPAN_SEND_PROMPTS, names.SPAN_PROCESS, names.SPAN_QUEUE, names.SPAN_PREFILL, names.SPAN_DECODE)
    assert in_order(spans, names.SPAN_DECODE, names.SPAN_SEND_RESULTS)


def in_order(spans: dict[str, Span], *wanted: str) -> bool:
    """Whether these began one after the other."""
    starts = [spans[name]["startTime"] for name in wanted]
    return starts == sorted(starts)


async def test_a_grpc_stream_is_one_trace_from_the_caller_to_the_last_token(
    app: App, producer: Tracing, jaeger_server: JaegerServer
) -> None:
    caller = producer.start("caller")
    prompt = PromptRequest(messages=(("user", "Hello"),), sampling=SamplingFields(max_tokens=5))
    async with SluiceClient(app.endpoints.grpc) as client:
        options = CallOptions(traceparent=tracing.traceparent(caller))
        async with client.stream(prompt, options=options) as events:
            received = [event async for event in events]
    producer.end(caller)
    expected = {
        "caller": None,
        STREAM: "caller",
        CHAT: STREAM,
        names.SPAN_QUEUE: CHAT,
        names.SPAN_PREFILL: CHAT,
        names.SPAN_DECODE: CHAT,
    }
    spans = await trace_of(jaeger_server, tracing.trace_id(caller), set(expected))
    assert tree(spans) == expected
    assert received[-1].trace_id == tracing.trace_id(caller)


FAILURES: dict[str, tuple[dict[str, Any], dict[str, bytes], str]] = {
    "refused": ({"prompt": "a", "sampling": {"max_tokens": 1_000_000}}, {}, "too_many_tokens"),
    "unreadable": ({"prompt": "a", "wrong": 1}, {}, "unknown_field"),
    "expired before it began": ({"prompt": "a"}, {"sluice-deadline": b"2020-01-01T00:00:00Z"}, "deadline_exceeded"),
    "expired on the way": ({"prompt": "a", "sampling": {"max_tokens": 5000}, "ttl_ms": 400}, {}, "deadline_exceeded"),
}


@pytest.mark.parametrize(("prompt", "headers", "code"), FAILURES.values(), ids=FAILURES)
async def test_a_prompt_that_fails_has_spans_that_say_why(
    app: App,
    producer: Tracing,
    jaeger_server: JaegerServer,
    topics_of_its_own: Broker,
    prompt: dict[str, Any],
    headers: dict[str, bytes],
    code: str,
) -> None:
    trace_id, record, result = await published(topics_of_its_own, producer, prompt, **headers)
    wanted = {names.SPAN_SEND_PROMPTS, names.SPAN_PROCESS, names.SPAN_SEND_RESULTS}
    spans = await trace_of(jaeger_server, trace_id, wanted)
    assert result["error"]["code"] == code
    assert (tags(spans[names.SPAN_PROCESS])["error"], tags(spans[names.SPAN_PROCESS])[names.ERROR_TYPE]) == (True, code)
    assert {tags(span)[names.ERROR_TYPE] for name, span in spans.items() if name == CHAT} <= {code}
    assert trace_id.encode() in dict(record.headers())["traceparent"]


async def test_a_cancelled_stream_has_spans_with_an_error(app: App, producer: Tracing, jaeger_server: JaegerServer) -> None:
    caller = producer.start("caller")
    prompt = PromptRequest(text="go on", sampling=SamplingFields(max_tokens=5000))
    async with SluiceClient(app.endpoints.grpc) as client:
        options = CallOptions(traceparent=tracing.traceparent(caller))
        async with client.stream(prompt, options=options) as events:
            await anext(events)
            assert await client.cancel(events.request_id)
            with contextlib.suppress(SluiceError):
                async for _ in events:
                    pass
    producer.end(caller)
    spans = await trace_of(jaeger_server, tracing.trace_id(caller), {"caller", STREAM, CHAT, names.SPAN_QUEUE})
    assert tags(spans[CHAT])[names.ERROR_TYPE] == "cancelled"
    assert tags(spans[CHAT])["error"] is True
