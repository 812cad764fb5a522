"""`sluice publish` and `sluice tail`: prompts in, chunks and results out, from a terminal."""

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.structs import ConsumerRecord
from opentelemetry.trace import SpanKind
from rich.markup import escape

from service import wire
from service.cli import output, prompts
from service.cli.options import ConfigFile, Json, Overrides, settings_from
from service.config import Settings
from service.contract import PromptRequest, Source
from service.errors import RequestError, SetupError
from service.kafka.connection import Connection
from service.telemetry import names, tracing

CONNECT_TIMEOUT_S = 10.0
Brokers = Annotated[str | None, typer.Option("--brokers", "-b", help="Comma-separated host:port.", show_default=False)]


def publish(
    text: Annotated[str, typer.Argument(metavar="[TEXT]", help="The prompt; - reads standard input.", show_default=False)] = "",
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="A JSON Lines file, one Prompt a line, instead of TEXT.", show_default=False),
    ] = None,
    key: Annotated[str, typer.Option("--key", help="The record's key; default: the label.", show_default=False)] = "",
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait for the results and print them.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for all results.")] = 120.0,
    raw: prompts.Raw = False,
    system: prompts.System = "",
    max_tokens: prompts.MaxTokens = None,
    temperature: prompts.Temperature = 0.0,
    top_p: prompts.TopP = None,
    seed: prompts.Seed = None,
    stop: prompts.Stop = None,
    label: prompts.Label = "",
    brokers: Brokers = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Write prompts to the prompts topic; prints each one's request id (topic-partition-offset)."""
    settings = settings_from(config, overrides, {"kafka": {"bootstrap_servers": brokers}})
    if file is not None:
        requests = list(_read_lines(file))
    elif text:
        requests = [
            prompts.prompt_request(
                text,
                raw=raw,
                system=system,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                stop=stop,
                label=label,
            )
        ]
    else:
        raise SetupError("nothing to publish: give TEXT, or --file with one JSON prompt a line")
    asyncio.run(_publish(settings, requests, key, timeout if wait else 0.0, as_json))


def tail(
    chunks: Annotated[bool, typer.Option("--chunks", help="Follow the tokens as they are made, not the results.")] = False,
    from_beginning: Annotated[bool, typer.Option("--from-beginning", help="Everything that the topic holds.")] = False,
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="End after this many records; 0: never.")] = 0,
    brokers: Brokers = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Follow the results (or chunks) topic until Ctrl-C."""
    settings = settings_from(config, overrides, {"kafka": {"bootstrap_servers": brokers}})
    asyncio.run(_tail(settings, "chunks" if chunks else "results", from_beginning, count, as_json))


def _read_lines(file: Path) -> Iterator[PromptRequest]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise SetupError(f"cannot read {file}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield wire.prompt_from_bytes(line)
        except RequestError as error:
            raise SetupError(f"{file}, line {number}: {error}; nothing was published") from error


async def _publish(settings: Settings, requests: list[PromptRequest], key: str, wait_s: float, as_json: bool) -> None:
    topic = settings.kafka.topic_prefix + "prompts"
    spans = tracing.Tracing(settings.tracing)
    results = settings.kafka.topic_prefix + "results"
    try:
        async with _producer(settings) as producer, _reader(settings, results, wait_s > 0) as reader:
            pending: set[str] = set()
            for request in requests:
                span = spans.start(
                    names.SPAN_SEND_PROMPTS, kind=SpanKind.PRODUCER, attributes={names.MESSAGING_SYSTEM: "kafka"}
                )
                headers = [("content-type", wire.JSON.encode())] + [(k, v.encode()) for k, v in tracing.inject(span)]
                record = await producer.send_and_wait(
                    topic,
                    wire.to_bytes(wire.prompt_to_proto(request)),
                    key=(key or request.label or uuid.uuid4().hex).encode(),
                    headers=headers,
                )
                spans.end(span)
                request_id = Source(topic=topic, partition=record.partition, offset=record.offset).request_id
                pending.add(request_id)
                if as_json:
                    output.print_json({"request_id": request_id, "trace_id": tracing.trace_id(span)})
                else:
                    output.out.print(
                        f"[bold]{request_id}[/]" + (f" [dim]trace {tracing.trace_id(span)}[/]" if spans.enabled else "")
                    )
            if reader is not None:
                await _await_results(reader, pending, wait_s, as_json)
    except KafkaError as error:
        raise unreachable(settings, error) from error
    finally:
        spans.shutdown()


async def _await_results(reader: AIOKafkaConsumer, pending: set[str], wait_s: float, as_json: bool) -> None:
    try:
        async with asyncio.timeout(wait_s):
            while pending:
                record = await reader.getone()
                request_id = (record.key or b"").decode("utf-8", "replace")
                if request_id in pending:
                    pending.discard(request_id)
                    _show_result(record, as_json)
    except TimeoutError:
        missing = ", ".join(sorted(pending))
        raise SetupError(
            f"no result for {missing} within {wait_s:g} s; is a replica running? `sluice doctor` looks", exit_code=1
        ) from None


async def _tail(settings: Settings, kind: str, from_beginning: bool, count: int, as_json: bool) -> None:
    topic = settings.kafka.topic_prefix + kind
    try:
        async with _reader(settings, topic, True, from_beginning=from_beginning) as reader:
            assert reader is not None
            seen = 0
            async for record in reader:
                (_show_result if kind == "results" else _show_chunk)(record, as_json)
                seen += 1
                if seen == count:
                    return
    except KafkaError as error:
        raise unreachable(settings, error) from error


def _show_result(record: ConsumerRecord, as_json: bool) -> None:
    value = _value(record)
    if as_json:
        output.print_json(value)
        return
    failed = value.get("status") == "failed"
    output.out.print(f"[bold {'red' if failed else 'green'}]{escape(str(value.get('request_id', '')))}[/]", end=" ")
    if failed:
        error = value.get("error", {})
        output.out.print(escape(f"{error.get('code')}: {error.get('field', '')} {error.get('message')}"))
        return
    usage, timings = value.get("usage", {}), value.get("timings", {})
    output.out.print(
        f"[dim]{usage.get('prompt_tokens')} prompt ({usage.get('cached_prompt_tokens')} cached), {usage.get('completion_tokens')} tokens, "
        f"TTFT {timings.get('ttft_ms', 0):.0f} ms, {timings.get('total_ms', 0):.0f} ms[/]"
    )
    for choice in value.get("choices", []):
        output.write(choice.get("text", "") + "\n")


def _show_chunk(record: ConsumerRecord, as_json: bool) -> None:
    kind = next((v.decode("ascii", "replace") for k, v in record.headers if k == "sluice-type"), "chunk")
    value = _value(record)
    if as_json:
        output.print_json({"type": kind} | value)
    elif kind == "chunk":
        output.out.print(
            f"[dim]{escape(str(value.get('request_id')))}[{value.get('choice', 0)}] {value.get('seq', 0)}:[/]", end=" "
        )
        output.write(value.get("text", "") + "\n")
    else:
        output.out.print(f"[dim]{escape(str(value.get('request_id')))} {kind}[/]")


def _value(record: ConsumerRecord) -> dict[str, Any]:
    try:
        value = json.loads(record.value or b"{}")
    except ValueError:
        value = None
    # Any program may write to a topic: what is not ours is shown as what it is.
    return (
        value
        if isinstance(value, dict)
        else {"request_id": f"{record.topic}-{record.partition}-{record.offset}", "unreadable": True}
    )


@asynccontextmanager
async def _producer(settings: Settings) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(**Connection(settings.kafka).aiokafka(), enable_idempotence=not settings.kafka.embedded)
    async with connected(producer, producer.stop, settings):
        yield producer


@asynccontextmanager
async def _reader(
    settings: Settings, topic: str, wanted: bool, *, from_beginning: bool = False
) -> AsyncIterator[AIOKafkaConsumer | None]:
    """A reader of the whole topic without a group, placed before anything that is written from now on."""
    if not wanted:
        yield None
        return
    consumer = AIOKafkaConsumer(
        topic,
        **Connection(settings.kafka).aiokafka(),
        auto_offset_reset="earliest" if from_beginning else "latest",
        isolation_level="read_uncommitted" if topic.endswith("chunks") else "read_committed",
        enable_auto_commit=False,
    )
    async with connected(consumer, consumer.stop, settings):
        if not consumer.partitions_for_topic(topic):
            raise SetupError(f"topic {topic} does not exist; make it with `sluice topics create`", exit_code=1)
        for partition in consumer.assignment():
            await consumer.position(partition)
        yield consumer


class Startable(Protocol):
    """A client of aiokafka: they share `start`, and differ in how they end."""

    async def start(self) -> None: ...


@asynccontextmanager
async def connected(client: Startable, stop: Callable[[], Awaitable[None]], settings: Settings) -> AsyncIterator[None]:
    """`client` started for the block and stopped after it. Raises `SetupError` (exit code 3) when no broker answers in time."""
    # What it has to say reaches the person as one error, below.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await client.start()
    except (KafkaError, TimeoutError, OSError) as error:
        await stop()
        raise unreachable(settings, await Connection(settings.kafka).explain() or error) from error
    try:
        yield
    finally:
        await stop()


def unreachable(settings: Settings, error: BaseException | str) -> SetupError:
    """What a person is told when no broker answers."""
    reason = str(error) or type(error).__name__
    return SetupError(
        f"no Kafka broker answers at {settings.kafka.bootstrap_servers} ({reason}); "
        "start one (`make serve` brings one), or name yours with --brokers host:port",
        exit_code=3,
    )
