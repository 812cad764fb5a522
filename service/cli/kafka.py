"""`sluice publish`: prompts straight to Kafka; and how every command that speaks to a broker connects."""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    NoBrokersAvailable,
    NodeNotReadyError,
    RequestTimedOutError,
)
from opentelemetry.trace import SpanKind

from service import wire
from service.cli import output, prompts
from service.cli.options import Common, grouped, settings_from, utf8
from service.cli.results import as_document, show_result
from service.config import Settings
from service.contract import PromptRequest, Source
from service.errors import RequestError, SetupError
from service.kafka.connection import Connection
from service.kafka.request_log import read_result
from service.kafka.topics import Topics, class_named, to_write
from service.telemetry import names, tracing

CONNECT_TIMEOUT_S = 10.0
_CONNECTION_ERRORS = (
    KafkaConnectionError,
    KafkaTimeoutError,
    NoBrokersAvailable,
    NodeNotReadyError,
    RequestTimedOutError,
    TimeoutError,
)
Brokers = Annotated[str | None, typer.Option("--brokers", "-b", help="Comma-separated host:port.", show_default=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnBrokers(Common):
    """What every command that speaks to Kafka takes."""

    brokers: Brokers = None

    def settings(self, flags: Mapping[str, Mapping[str, Any]] | None = None) -> Settings:
        """As `settings_from`, at the brokers that were named."""
        flags = flags or {}
        return settings_from(
            self.config, self.overrides, {**flags, "kafka": {**flags.get("kafka", {}), "bootstrap_servers": self.brokers}}
        )


@grouped
def publish(
    asked: prompts.PromptOptions,
    common: OnBrokers,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The prompt; - reads standard input.", show_default=False)] = "",
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="A JSON Lines file, one Prompt a line, instead of TEXT.", show_default=False),
    ] = None,
    key: Annotated[
        str, typer.Option("--key", callback=utf8, help="The record's key; default: the label.", show_default=False)
    ] = "",
    queue_class: prompts.ClassName = "",
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait for the results and print them.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for all results.")] = 120.0,
) -> None:
    """Write prompts to the prompts topic, or to a class's; prints each one's request id (topic-partition-offset).

    With --wait: exit 1 when one failed or was cancelled.
    """
    settings = common.settings()
    if queue_class:
        # What no broker need be asked for.
        class_named(queue_class)
    if file is not None and (text or asked != prompts.PromptOptions()):
        raise SetupError("--file holds whole prompts: leave TEXT and the options of a prompt away")
    if file is not None:
        requests = list(_read_lines(file))
        if not requests:
            raise SetupError(f"{file} holds no prompt: write one JSON prompt a line")
    elif text:
        requests = [asked.request(text)]
    else:
        raise SetupError("nothing to publish: give TEXT, or --file with one JSON prompt a line")
    if asyncio.run(_publish(settings, requests, key, queue_class, timeout if wait else 0.0, common.as_json)):
        raise typer.Exit(1)


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


async def _publish(
    settings: Settings, requests: list[PromptRequest], key: str, queue_class: str, wait_s: float, as_json: bool
) -> int:
    """How many did not finish, of those that were waited for."""
    topics = Topics(settings.kafka.topic_prefix)
    spans = tracing.Tracing(settings.tracing)
    try:
        async with _producer(settings) as producer, AsyncExitStack() as stack:
            topic = await _topic(producer, topics, queue_class)
            # Placed before anything is written, so that no result is missed.
            waiting = await stack.enter_async_context(reader(settings, topics.results, at_end)) if wait_s > 0 else None
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
            return await _await_results(waiting, pending, wait_s, as_json) if waiting is not None else 0
    except MessageSizeTooLargeError as error:
        raise RequestError("prompt_too_long", str(error), field="prompt") from error
    except KafkaError as error:
        raise refused(settings, error) from error
    finally:
        spans.shutdown()


async def _topic(producer: AIOKafkaProducer, topics: Topics, queue_class: str) -> str:
    """The topic to write to, which is there. Raises `SetupError`, `RequestError`."""
    existing = (await producer.client.fetch_all_metadata()).topics()

    async def exists(name: str) -> bool:
        return name in existing

    topic = await to_write(topics, queue_class, exists)
    if topic not in existing:
        raise missing(topic)
    return topic


async def _await_results(records: AIOKafkaConsumer, pending: set[str], wait_s: float, as_json: bool) -> int:
    """Shows each result as it comes; how many of them did not finish. Raises `SetupError` when one does not come in time."""
    failed = 0
    try:
        async with asyncio.timeout(wait_s):
            while pending:
                record = await records.getone()
                request_id = (record.key or b"").decode("utf-8", "replace")
                terminal = read_result(record) if request_id in pending else None
                # What is none of ours, though it has its key, ends no waiting: the result may still come.
                if terminal is not None:
                    pending.discard(request_id)
                    value = as_document(terminal.result)
                    show_result(value, as_json)
                    failed += value.get("status") != "finished"
    except TimeoutError:
        missing = ", ".join(sorted(pending))
        raise SetupError(
            f"no result for {missing} within {wait_s:g} s; is a replica running? `sluice doctor` looks", exit_code=1
        ) from None
    return failed


@asynccontextmanager
async def _producer(settings: Settings) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(**Connection(settings.kafka).aiokafka(), enable_idempotence=not settings.kafka.embedded)
    async with connected(producer, producer.stop, settings):
        yield producer


@asynccontextmanager
async def reader(
    settings: Settings, topic: str, place: Callable[[AIOKafkaConsumer], Awaitable[None]]
) -> AsyncIterator[AIOKafkaConsumer]:
    """A reader of the whole topic without a group, where `place` has put it. Raises `SetupError`.

    It is looked for among all topics, here as in `publish`: a broker that creates topics by itself would make one that is asked for.
    """
    consumer = AIOKafkaConsumer(
        **Connection(settings.kafka).aiokafka(),
        auto_offset_reset="earliest",
        isolation_level="read_uncommitted" if topic.endswith("chunks") else "read_committed",
        enable_auto_commit=False,
    )
    async with connected(consumer, consumer.stop, settings):
        found = (await consumer._client.fetch_all_metadata()).partitions_for_topic(topic)
        if not found:
            raise missing(topic)
        consumer.assign([TopicPartition(topic, partition) for partition in sorted(found)])
        await place(consumer)
        yield consumer


async def at_end(consumer: AIOKafkaConsumer) -> None:
    """Before anything that is written from now on."""
    for partition, end in (await consumer.end_offsets(list(consumer.assignment()))).items():
        consumer.seek(partition, end)


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


def missing(topic: str) -> SetupError:
    """What a person is told of a topic that is not there."""
    return SetupError(f"topic {topic} does not exist; make it with `sluice topics create`", exit_code=1)


def refused(settings: Settings, error: KafkaError | TimeoutError) -> SetupError:
    """What a person is told of a command that a broker had begun to answer: what it said, or that it answers no more."""
    if isinstance(error, _CONNECTION_ERRORS):
        return unreachable(settings, error)
    return SetupError(f"the broker at {settings.kafka.bootstrap_servers} answered with an error: {error}", exit_code=1)


def unreachable(settings: Settings, error: BaseException | str) -> SetupError:
    """What a person is told when no broker answers."""
    reason = str(error) or type(error).__name__
    return SetupError(
        f"no Kafka broker answers at {settings.kafka.bootstrap_servers} ({reason}); "
        "start one (`make serve` brings one), or name yours with --brokers host:port",
        exit_code=3,
    )
