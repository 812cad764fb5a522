"""`sluice dlq list|show|replay`: what could not be served, why, and once more."""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import typer
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka import TopicPartition as ClientPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from google.protobuf import json_format
from rich.markup import escape
from rich.table import Column, Table

from service.cli import output
from service.cli.kafka import OnBrokers, connected, refused
from service.cli.options import grouped
from service.config import Settings
from service.contract import Source
from service.errors import CODES, SetupError
from service.kafka.connection import Connection
from service.kafka.dead_letter_reader import Letter, ReplayError, letters, replay_record
from service.kafka.topics import Topics, count_partitions

app = typer.Typer(no_args_is_help=True, help="Look at dead letters, and replay them.")

Code = Annotated[str, typer.Option("--code", help="Only those with this error code.", show_default=False)]
_READ_TIMEOUT_S = 10.0


@app.command("list")
@grouped
def list_letters(
    common: OnBrokers,
    code: Code = "",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="The newest this many.")] = 100,
) -> None:
    """The dead letters, oldest first; one JSON object a line with --json."""
    settings = common.settings()
    found = asyncio.run(_chosen(settings, (), _known(code)))
    rows = sorted((_row(letter) for letter in found), key=lambda row: row["time"])[-limit:]
    if common.as_json:
        for row in rows:
            output.print_json(row)
        return
    request = Column("request", no_wrap=True)
    table = Table("time", request, "code", "field", "stage", "label", "bytes", box=None, header_style="dim", padding=(0, 1))
    for row in rows:
        table.add_row(
            *(escape(str(row[name])) for name in ("time", "request_id", "code", "field", "stage", "label", "original_bytes"))
        )
    output.out.print(table if rows else "no dead letters")


@app.command()
@grouped
def show(
    common: OnBrokers,
    request_id: Annotated[str, typer.Argument(help="As `sluice dlq list` prints it.")],
) -> None:
    """One dead letter whole: the error, the origin, the original headers and value."""
    settings = common.settings()
    letter = asyncio.run(_chosen(settings, (request_id,), ""))[-1]
    assert letter.message is not None
    if common.as_json:
        output.print_json(json_format.MessageToDict(letter.message, preserving_proto_field_name=True))
        return
    message = letter.message
    for name, value in {**_row(letter), "message": message.error.message, "attempts": message.attempts}.items():
        output.out.print(f"[dim]{name}:[/] {escape(str(value))}")
    for name, content in sorted(message.original_headers.items()):
        output.out.print(f"[dim]header {escape(name)}:[/] {escape(content.decode('utf-8', 'backslashreplace'))}")
    output.out.print("[dim]value:[/]" + ("" if letter.is_whole else " [yellow]too large to keep; see the original topic[/]"))
    output.write(message.original_value.decode("utf-8", "backslashreplace") + "\n")


@app.command()
@grouped
def replay(
    common: OnBrokers,
    request_ids: Annotated[
        list[str] | None, typer.Argument(help="As `sluice dlq list` prints them.", show_default=False)
    ] = None,
    code: Code = "",
    every: Annotated[bool, typer.Option("--all", help="Every dead letter there is.")] = False,
    keep_deadline: Annotated[bool, typer.Option("--keep-deadline", help="Keep the headers that limit its time.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written; write nothing.")] = False,
) -> None:
    """Write the original records again, each where it stood, with `sluice-replay-of`; prints the new request ids."""
    if not (request_ids or code or every):
        raise SetupError("nothing to replay: name request ids, or --code CODE, or --all")
    settings = common.settings()
    failed = asyncio.run(_replay(settings, tuple(request_ids or ()), _known(code), keep_deadline, dry_run, common.as_json))
    if failed:
        raise typer.Exit(1)


async def _replay(
    settings: Settings, request_ids: tuple[str, ...], code: str, keep_deadline: bool, dry_run: bool, as_json: bool
) -> int:
    """How many could not be replayed."""
    failed = 0
    found = {letter.request_id: letter for letter in await _chosen(settings, request_ids, code)}
    try:
        async with _admin(settings) as admin, _consumer(settings) as consumer, _producer(settings) as producer:

            async def original(topic: str, partition: int, offset: int) -> bytes | None:
                if partition >= (await count_partitions(admin, [topic])).get(topic, 0):
                    return None
                return await _read_one(consumer, ClientPartition(topic, partition), offset)

            for request_id, letter in found.items():
                try:
                    record = await replay_record(letter, original, keep_deadline=keep_deadline)
                except ReplayError as error:
                    failed += 1
                    output.err.print(f"[red]not replayed[/] {escape(request_id)}: {escape(str(error))}")
                    continue
                new_id = ""
                if not dry_run:
                    sent = await producer.send_and_wait(
                        record.topic, record.value, key=record.key, partition=record.partition, headers=list(record.headers)
                    )
                    new_id = Source(topic=sent.topic, partition=sent.partition, offset=sent.offset).request_id
                if as_json:
                    output.print_json({"replay_of": request_id, "request_id": new_id, "topic": record.topic})
                else:
                    output.out.print(f"{escape(request_id)} → " + (f"[bold]{escape(new_id)}[/]" if new_id else "(dry run)"))
    except KafkaError as error:
        raise refused(settings, error) from error
    return failed


async def _chosen(settings: Settings, request_ids: tuple[str, ...], code: str) -> list[Letter]:
    """The letters of these ids (of all, when none is named) with this code. Raises `SetupError` for an id that has none."""
    topic = Topics(settings.kafka.topic_prefix).dead_letters
    found = []
    try:
        async with _admin(settings) as admin, _consumer(settings) as consumer:
            counts = await count_partitions(admin, [topic])
            if not counts:
                raise SetupError(f"topic {topic} does not exist, or may not be seen; `sluice topics check` looks", exit_code=1)
            async for letter in letters(consumer, topic, counts[topic]):
                wanted = not request_ids or letter.request_id in request_ids
                if letter.message is not None and wanted and code in ("", letter.message.error.code):
                    found.append(letter)
    except (KafkaError, TimeoutError) as error:
        raise refused(settings, error) from error
    if missing := [name for name in request_ids if name not in {letter.request_id for letter in found}]:
        raise SetupError(f"no dead letter for {', '.join(missing)}; `sluice dlq list` shows those there are", exit_code=1)
    return found


def _row(letter: Letter) -> dict[str, Any]:
    message = letter.message
    assert message is not None
    return {
        "request_id": message.request_id,
        "time": message.time.ToJsonString(),
        "code": message.error.code,
        "field": message.error.field,
        "stage": message.stage,
        "label": message.original_headers.get("sluice-label", b"").decode("utf-8", "replace"),
        "key": base64.b64encode(message.original_key).decode(),
        "original_bytes": message.original_value_bytes,
        "whole": letter.is_whole,
        "traceparent": message.traceparent,
        "position": f"{letter.partition}-{letter.offset}",
    }


def _known(code: str) -> str:
    if code and code not in CODES:
        raise SetupError(f"--code {code}: no such code; those there are: {', '.join(CODES)}")
    return code


async def _read_one(consumer: AIOKafkaConsumer, partition: ClientPartition, offset: int) -> bytes | None:
    """The value at an offset; None when there is none any more."""
    consumer.assign([partition])
    begin = (await consumer.beginning_offsets([partition]))[partition]
    end = (await consumer.end_offsets([partition]))[partition]
    if not begin <= offset < end:
        return None
    consumer.seek(partition, offset)
    async with asyncio.timeout(_READ_TIMEOUT_S):
        record = await consumer.getone(partition)
    return record.value if record.offset == offset else None


@asynccontextmanager
async def _consumer(settings: Settings) -> AsyncIterator[AIOKafkaConsumer]:
    """One without a group: nothing that this command reads counts as read."""
    consumer = AIOKafkaConsumer(
        **Connection(settings.kafka).aiokafka(),
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        enable_auto_commit=False,
    )
    async with connected(consumer, consumer.stop, settings):
        yield consumer


@asynccontextmanager
async def _admin(settings: Settings) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(**Connection(settings.kafka).aiokafka())
    async with connected(admin, admin.close, settings):
        yield admin


@asynccontextmanager
async def _producer(settings: Settings) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(
        **Connection(settings.kafka).aiokafka(), enable_idempotence=not settings.kafka.embedded, acks="all"
    )
    async with connected(producer, producer.stop, settings):
        yield producer
