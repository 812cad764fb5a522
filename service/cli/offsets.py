"""`sluice offsets show`: how far each partition is, decoded from what the group committed."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import typer
from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as ClientPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupAuthorizationFailedError, GroupCoordinatorNotAvailableError, KafkaError
from aiokafka.structs import OffsetAndMetadata
from rich.markup import escape
from rich.table import Table

from service.cli import output
from service.cli.kafka import OnBrokers, connected, refused
from service.cli.options import grouped
from service.config import Settings
from service.errors import SetupError
from service.kafka.connection import Connection
from service.kafka.topics import Topics, count_partitions
from service.kafka.tracker import Progress, decode

app = typer.Typer(no_args_is_help=True, help="Look at the group's progress.")

_SHOWN_OFFSETS = 8
_COORDINATOR_TRIES = 10


@app.command()
@grouped
def show(common: OnBrokers) -> None:
    """The committed offset, epoch and unfinished prompts of each partition; one JSON object a line with --json."""
    settings = common.settings()
    rows = asyncio.run(_rows(settings))
    if common.as_json:
        for row in rows:
            output.print_json(row)
        return
    table = Table(
        "partition", "low", "taken to", "end", "lag", "epoch", "done above low", "unfinished", box=None, header_style="dim"
    )
    for row in rows:
        offsets = [str(offset) for offset in row["unfinished"][:_SHOWN_OFFSETS]]
        more = len(row["unfinished"]) - len(offsets)
        said = ", ".join(offsets) + (f" and {more} more" if more > 0 else "")
        cells = [
            row["partition"],
            *(row[name] for name in ("low", "taken_to", "end", "lag", "epoch", "num_done_above_low")),
            said,
        ]
        table.add_row(*(escape("-" if cell is None else str(cell)) for cell in cells))
    output.out.print(table)


def describe(partition: str, low: int | None, progress: Progress, begin: int, end: int) -> dict[str, Any]:
    """One partition as plain values. `low` None: nothing was committed yet, so that everything it holds is to be read."""
    start = begin if low is None else low
    taken_to = max(progress.next_offset, start)
    done = progress.done
    return {
        "partition": partition,
        "low": low,
        "taken_to": taken_to,
        "end": end,
        "lag": max(end - start, 0) - done.bit_count(),
        "epoch": progress.epoch if low is not None else None,
        "num_done_above_low": done.bit_count(),
        "done_ranges": [[start + first, start + last] for first, last in _ranges(done)],
        "unfinished": [offset for offset in range(start, min(taken_to, end)) if not done >> (offset - start) & 1],
        "chunk_low": progress.chunk_low if progress.chunk_low >= 0 else None,
    }


def _ranges(bits: int) -> Iterator[tuple[int, int]]:
    """(first, last) of each run of set bits."""
    position = 0
    while bits:
        zeros = (bits & -bits).bit_length() - 1
        bits >>= zeros
        ones = (~bits & (bits + 1)).bit_length() - 1
        yield position + zeros, position + zeros + ones - 1
        bits >>= ones
        position += zeros + ones


async def _committed(
    admin: AIOKafkaAdminClient, group_id: str, asked: list[ClientPartition]
) -> dict[ClientPartition, OffsetAndMetadata]:
    """The group's commits. On a cluster that had no group yet, asking makes its coordinator, which takes some seconds."""
    for _ in range(_COORDINATOR_TRIES):
        try:
            found: dict[ClientPartition, OffsetAndMetadata] = await admin.list_consumer_group_offsets(
                group_id, partitions=asked
            )
        except GroupCoordinatorNotAvailableError:
            await asyncio.sleep(1.0)
        else:
            return found
    raise SetupError(f"the coordinator of group {group_id} is not there yet; try again in a moment", exit_code=3)


async def _rows(settings: Settings) -> list[dict[str, Any]]:
    kafka = settings.kafka
    arguments = Connection(kafka).aiokafka()
    admin = AIOKafkaAdminClient(**arguments)
    try:
        async with connected(admin, admin.close, settings), AsyncExitStack() as stack:
            # Made once a broker has answered: one that is made and not stopped complains.
            consumer = AIOKafkaConsumer(**arguments, enable_auto_commit=False)
            await stack.enter_async_context(connected(consumer, consumer.stop, settings))
            counts = await count_partitions(admin, Topics(kafka.topic_prefix).classes)
            asked = [ClientPartition(name, number) for name, count in sorted(counts.items()) for number in range(count)]
            if not asked:
                raise SetupError(
                    f"no topic {kafka.topic_prefix}prompts, or it may not be seen; `sluice topics check` looks", exit_code=1
                )
            committed = await _committed(admin, kafka.group_id, asked)
            begins, ends = await consumer.beginning_offsets(asked), await consumer.end_offsets(asked)
    except GroupAuthorizationFailedError as error:
        raise SetupError(f"these credentials may not Describe the group {kafka.group_id}", exit_code=1) from error
    except KafkaError as error:
        raise refused(settings, error) from error
    rows = []
    for partition in asked:
        point = committed.get(partition)
        low = point.offset if point is not None and point.offset >= 0 else None
        progress = decode(point.metadata) if point is not None and low is not None else Progress()
        name = f"{partition.topic}-{partition.partition}"
        rows.append(describe(name, low, progress, begins[partition], ends[partition]))
    return rows
