"""`sluice tail`: the results, or the tokens as they are made, from any point of their topic on."""

import asyncio
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

import typer
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError
from aiokafka.structs import ConsumerRecord
from rich.markup import escape

from schemas.v1 import events_pb2
from service.cli import output
from service.cli.kafka import OnBrokers, reader, refused
from service.cli.options import grouped
from service.cli.results import as_document, show_result
from service.config import Settings
from service.contract import Delta, ReaderEvent, Reset
from service.errors import SetupError
from service.kafka.chunk_records import ChunkMessage, read_chunk_record
from service.kafka.reader_fold import ReaderFold
from service.kafka.records import HEADER_TYPE
from service.kafka.request_log import read_result

MAX_REQUESTS = 4_096
"""Requests whose chunks are folded at once; the one that has been silent for longest goes first."""
_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


@grouped
def tail(
    common: OnBrokers,
    chunks: Annotated[bool, typer.Option("--chunks", help="Follow the tokens as they are made, not the results.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="With --chunks: each record as it is, those of replaced owners too.")
    ] = False,
    start: Annotated[
        str,
        typer.Option(
            "--from", metavar="WHERE", help="beginning, end, an offset (of every partition), 15m (ago), or an RFC 3339 time."
        ),
    ] = "end",
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="End after this many lines; 0: never.")] = 0,
) -> None:
    """Follow the results (or chunks) topic until Ctrl-C. Tokens are shown once each, whichever replicas made them."""
    settings = common.settings()
    if raw and not chunks:
        raise SetupError("--raw goes with --chunks: results are always shown as they are")
    asyncio.run(_tail(settings, "chunks" if chunks else "results", raw, starting(start, time.time()), count, common.as_json))


@dataclass(frozen=True, slots=True)
class Start:
    """Where reading begins; `value`: an offset, or milliseconds since the epoch."""

    kind: Literal["beginning", "end", "offset", "time"]
    value: int = 0


def starting(text: str, now_s: float) -> Start:
    """What `--from` says. Raises `SetupError`."""
    if text in ("beginning", "end"):
        return Start("beginning" if text == "beginning" else "end")
    if text.isascii() and text.isdigit() and len(text) <= 18:
        return Start("offset", int(text))
    if ago := re.fullmatch(r"([0-9]{1,9})([smhd])", text):
        return Start("time", max(0, int((now_s - int(ago[1]) * _UNITS_S[ago[2]]) * 1_000)))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise SetupError(
            f"--from {text}: write beginning, end, an offset as 1200, a time ago as 15m, or a time with its zone as 2026-01-31T12:00:00Z"
        )
    return Start("time", max(0, int(moment.timestamp() * 1_000)))


async def _place(consumer: AIOKafkaConsumer, start: Start) -> None:
    partitions = sorted(consumer.assignment())
    begins, ends = await consumer.beginning_offsets(partitions), await consumer.end_offsets(partitions)
    found = await consumer.offsets_for_times(dict.fromkeys(partitions, start.value)) if start.kind == "time" else {}
    for partition in partitions:
        begin, end = begins[partition], ends[partition]
        if start.kind == "offset":
            offset = min(max(start.value, begin), end)
        elif start.kind == "time":
            offset = end if found.get(partition) is None else found[partition].offset
        else:
            offset = begin if start.kind == "beginning" else end
        consumer.seek(partition, offset)


async def _tail(settings: Settings, kind: str, raw: bool, start: Start, count: int, as_json: bool) -> None:
    folds: dict[str, ReaderFold] = {}
    shown = 0
    try:
        async with reader(settings, settings.kafka.topic_prefix + kind, lambda consumer: _place(consumer, start)) as records:
            async for record in records:
                for line in _lines(record, kind, raw, folds):
                    _show(line, kind, as_json)
                    shown += 1
                    if shown == count:
                        return
    except KafkaError as error:
        raise refused(settings, error) from error


def _lines(record: ConsumerRecord, kind: str, raw: bool, folds: dict[str, ReaderFold]) -> Iterator[dict[str, Any]]:
    """What a record adds, as JSON objects."""
    if kind == "results":
        terminal = read_result(record)
        yield result_document(record) if terminal is None else as_document(terminal.result)
        return
    message = read_chunk_record(record)
    if message is None:
        yield result_document(record)
    elif raw:
        yield {"type": dict(record.headers).get(HEADER_TYPE, b"").decode("ascii", "replace")} | as_document(message)
    else:
        yield from (_event(message.request_id, event) for event in _folded(message, folds))


def result_document(record: ConsumerRecord) -> dict[str, Any]:
    """A record that is not ours: any program may write to a topic."""
    return {"request_id": f"{record.topic}-{record.partition}-{record.offset}", "unreadable": True}


def _folded(message: ChunkMessage, folds: dict[str, ReaderFold]) -> Iterator[ReaderEvent]:
    fold = folds.pop(message.request_id, None) or ReaderFold(message.request_id)
    folds[message.request_id] = fold
    if len(folds) > MAX_REQUESTS:
        del folds[next(iter(folds))]
    if isinstance(message, events_pb2.Chunk):
        fold.join(message)
    return fold.take(message)


def _event(request_id: str, event: ReaderEvent) -> dict[str, Any]:
    if isinstance(event, Delta):
        return {
            "type": "delta",
            "request_id": request_id,
            "choice": event.choice,
            "seq": event.seq,
            "token_ids": list(event.token_ids),
            "text": event.text,
            "text_offset": event.text_offset,
        }
    if isinstance(event, Reset):
        return {"type": "reset", "request_id": request_id, "epoch": event.epoch, "resume_from": list(event.resume_from)}
    return {
        "type": "started",
        "request_id": request_id,
        "epoch": getattr(event, "epoch", 0),
        "seed": str(event.seed),
        "trace_id": event.trace_id,
    }


def _show(line: dict[str, Any], kind: str, as_json: bool) -> None:
    if kind == "results":
        show_result(line, as_json)
    elif as_json:
        output.print_json(line)
    elif "text" in line:
        output.out.print(f"[dim]{escape(line['request_id'])}[{line['choice']}] {line['seq']}:[/]", end=" ")
        output.write(line["text"] + "\n")
    else:
        what = f"goes on under epoch {line['epoch']}" if line.get("type") == "reset" else line.get("type", "unreadable")
        output.out.print(f"[dim]{escape(line['request_id'])} {what}[/]")
