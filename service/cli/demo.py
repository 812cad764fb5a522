"""`sluice demo`: prompts on a Kafka topic become tokens, live, in one command; then what each took, and one request's trace.

Everything is real but the broker, which is librdkafka's in-process one: it speaks Kafka's protocol but keeps nothing.
"""

import asyncio
import signal
from dataclasses import dataclass, field
from typing import Any

import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from google.protobuf import json_format
from opentelemetry.trace import SpanKind
from rich.console import Console

from schemas.v1 import events_pb2, inference_pb2
from service import wire
from service.app import App
from service.cli import output
from service.cli.demo_view import DemoView, Row, StreamView, results_table
from service.cli.options import ConfigFile, Json, Overrides, settings_from
from service.cli.serve import loading, resolve_model
from service.cli.trace_view import trace_table
from service.config import Settings
from service.contract import PromptRequest, SamplingFields, Source
from service.errors import SetupError
from service.kafka.topics import Topics
from service.telemetry import logging, names, tracing

DEADLINE_S = 80.0
MAX_TOKENS = 48
SYSTEM = (
    "You are the assistant of a small travel magazine. You answer readers' letters in a warm and plain voice, in two or three "
    "sentences, without lists and without headings. You never invent prices, opening hours or addresses; where you are not sure "
    "you say so and name who would know. You write for people who like trains, rivers, old libraries and good bread, and you "
    "assume that they have more time than money. When a reader names a country you keep to it."
)
QUESTIONS = (
    "What is the capital of France?",
    "What should I see in Lisbon on a rainy day?",
    "Which river runs through Budapest?",
    "Why do people love night trains?",
    "Where is good bread baked in Germany?",
    "Name one old library worth a detour in Ireland.",
    "How do I pack for a week in Norway in winter?",
    "What makes Kyoto special in autumn?",
)
FOLLOW_UP = "Thank you! And what would you eat there?"
NUM_FOLLOW_UPS = 4

Messages = tuple[tuple[str, str], ...]


@dataclass(slots=True)
class _Letter:
    """One prompt of the demo from its record to its result."""

    title: str
    messages: Messages
    view: StreamView = field(init=False)
    result: inference_pb2.Result | None = None
    trace_id: str = ""

    def __post_init__(self) -> None:
        self.view = StreamView(self.title)


def demo(config: ConfigFile = None, overrides: Overrides = None, as_json: Json = False) -> None:
    """A broker, the service and real prompts in one process: tokens live, then a table and a trace. Ends by itself."""
    flags: dict[str, dict[str, Any]] = {
        "kafka": {"enabled": True, "embedded": True, "bootstrap_servers": "127.0.0.1:0", "group_id": "sluice-demo"},
        "grpc": {"port": 0},
        "admin": {"port": 0},
    }
    settings = settings_from(config, overrides, flags)
    logging.configure(settings.logging, quiet=True)
    model_dir = resolve_model(settings)
    # On standard output a person watches; with --json programs read it, and the person's part goes to standard error.
    console = output.err if as_json else output.out
    app = App(settings, model_dir, keep_spans=True)
    letters = uvloop.run(_run(app, settings, console))
    if as_json:
        results = [json_format.MessageToDict(_result(letter), preserving_proto_field_name=True) for letter in letters]
        output.print_json({"requests": results})
        return
    _summary(console, app, letters)


async def _run(app: App, settings: Settings, console: Console) -> list[_Letter]:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        endpoints = await loading(app.core, app.start)
        console.print(
            f"[bold]Sluice[/] serves [bold]{app.core.model}[/] from Kafka topic [bold]{settings.kafka.topic_prefix}prompts[/] "
            f"at {endpoints.kafka} [dim](embedded broker: in memory, not durable)[/]"
        )
        try:
            async with asyncio.timeout(DEADLINE_S):
                return await _converse(app, settings, endpoints.kafka, console)
        except TimeoutError:
            raise SetupError(f"the answers did not come within {DEADLINE_S:g} s: is the machine busy?", exit_code=1) from None
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        try:
            await asyncio.shield(app.stop(grace_s=0.0))
        except asyncio.CancelledError:
            # Once more, while it stops.
            raise KeyboardInterrupt from None


async def _converse(app: App, settings: Settings, bootstrap: str, console: Console) -> list[_Letter]:
    topics = Topics(settings.kafka.topic_prefix)
    letters = [_Letter(f"reader {i}", (("system", SYSTEM), ("user", question))) for i, question in enumerate(QUESTIONS, 1)]
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap)
    consumer = AIOKafkaConsumer(topics.chunks, topics.results, bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    async with producer, consumer:
        await _round(app, producer, consumer, topics, letters, console, "Eight readers write; all letters begin alike:")
        answered = [_follow_up(letter) for letter in letters[:NUM_FOLLOW_UPS]]
        await _round(app, producer, consumer, topics, answered, console, "Four write again; their conversations are cached:")
    return letters + answered


def _follow_up(letter: _Letter) -> _Letter:
    answer = _result(letter).choices[0].text
    return _Letter(f"{letter.title}, again", (*letter.messages, ("assistant", answer), ("user", FOLLOW_UP)))


async def _round(
    app: App,
    producer: AIOKafkaProducer,
    consumer: AIOKafkaConsumer,
    topics: Topics,
    letters: list[_Letter],
    console: Console,
    heading: str,
) -> None:
    console.print(f"\n[bold]{heading}[/]")
    by_id: dict[str, _Letter] = {}
    for letter in letters:
        by_id[await _publish(app, producer, topics, letter)] = letter
    with DemoView(console, [letter.view for letter in letters]) as view:
        while any(letter.result is None for letter in letters):
            record = await consumer.getone()
            found = by_id.get((record.key or b"").decode("utf-8", "replace"))
            if found is None:
                continue
            if record.topic == topics.results:
                found.result = json_format.Parse(record.value, inference_pb2.Result())
                text = "".join(choice.text for choice in found.result.choices)
                view.finish(found.view, text, found.result.usage.completion_tokens)
            elif ("sluice-type", b"chunk") in record.headers:
                chunk = json_format.Parse(record.value, events_pb2.Chunk())
                view.chunk(found.view, chunk.text, len(chunk.token_ids))


async def _publish(app: App, producer: AIOKafkaProducer, topics: Topics, letter: _Letter) -> str:
    request = PromptRequest(
        messages=letter.messages, label=letter.title, sampling=SamplingFields(max_tokens=MAX_TOKENS, temperature=0.0)
    )
    span = app.core.tracing.start(
        names.SPAN_SEND_PROMPTS,
        kind=SpanKind.PRODUCER,
        attributes={names.MESSAGING_SYSTEM: names.SYSTEM_KAFKA, names.MESSAGING_DESTINATION_NAME: topics.prompts},
    )
    record = await producer.send_and_wait(
        topics.prompts,
        wire.to_bytes(wire.prompt_to_proto(request)),
        key=letter.title.encode(),
        headers=[("content-type", wire.JSON.encode()), *((name, value.encode()) for name, value in tracing.inject(span))],
    )
    app.core.tracing.end(span)
    letter.trace_id = tracing.trace_id(span)
    letter.view.request_id = Source(topic=record.topic, partition=record.partition, offset=record.offset).request_id
    return letter.view.request_id


def _result(letter: _Letter) -> inference_pb2.Result:
    if letter.result is None or letter.result.status != inference_pb2.Result.finished:
        code = letter.result.error.code if letter.result is not None else "no result"
        raise SetupError(f"{letter.title} got no answer ({code})", exit_code=1)
    return letter.result


def _summary(console: Console, app: App, letters: list[_Letter]) -> None:
    console.print()
    console.print(results_table([_row(letter) for letter in letters], console.width))
    first = letters[0]
    spans = [span for span in app.core.tracing.spans() if f"{span.context.trace_id:032x}" == first.trace_id]
    console.print(
        f"\n[bold]The trace of {first.view.request_id}[/], from the producer to the result record [dim]({first.trace_id})[/]"
    )
    console.print(trace_table(spans, console.width))
    console.print(
        "\nNext: [bold]make serve[/] keeps a service running; [bold]README.md[/] shows your own Kafka, gRPC and Jaeger."
    )


def _row(letter: _Letter) -> Row:
    result = _result(letter)
    decode_s = (result.timings.total_ms - result.timings.ttft_ms) / 1e3
    tokens = result.usage.completion_tokens
    return Row(
        title=letter.title,
        request_id=result.request_id,
        prompt_tokens=result.usage.prompt_tokens,
        cached_tokens=result.usage.cached_prompt_tokens,
        tokens=tokens,
        queue_ms=result.timings.queue_ms,
        ttft_ms=result.timings.ttft_ms,
        tokens_per_s=(tokens - 1) / decode_s if decode_s > 0 else 0.0,
        finish_reason=inference_pb2.FinishReason.Name(result.choices[0].finish_reason),
    )
