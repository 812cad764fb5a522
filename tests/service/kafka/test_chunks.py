"""Chunk records: when they go, in what order, and what they hold."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from schemas.v1 import events_pb2, inference_pb2
from service import wire
from service.contract import Delta, Source, Started
from service.errors import RequestError
from service.kafka.chunk_records import ChunkMessage
from service.kafka.chunks import ChunkStream, ChunkWriter, LiveListener
from tests.service.kafka.fakes import FakeOutput, until

SOURCE = Source(topic="t", partition=2, offset=9)
STARTED = Started(request_id="t-2-9", model="m", seed=5, prompt_tokens=1, trace_id="")


def token(seq: int, choice: int = 0) -> Delta:
    return Delta(choice=choice, seq=seq, token_ids=(seq,), text=str(seq % 10), text_offset=seq)


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.records: list[tuple[type[object], int]] = []

    def acknowledged(self, source: Source, message: ChunkMessage, offset: int) -> None:
        self.records.append((type(message), offset))

    def ended(self, source: Source, result: inference_pb2.Result) -> None:
        raise AssertionError("a stream of chunks ends nothing")


@asynccontextmanager
async def writing(
    output: FakeOutput,
    *,
    interval_s: float = 30.0,
    max_tokens: int = 16,
    listener: LiveListener | None = None,
    resume_from: tuple[int, ...] = (0,),
    written: Callable[[int], None] = lambda end: None,
) -> AsyncIterator[ChunkStream]:
    writer = ChunkWriter(
        output, topic="chunks", interval_s=interval_s, max_tokens=max_tokens, wall_ns=lambda: 0, listener=listener
    )
    task = asyncio.create_task(writer.run())
    try:
        yield writer.open(SOURCE, media_type=wire.JSON, epoch=3, attempt=1, resume_from=resume_from, written=written)
        await writer.flush()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def bodies(output: FakeOutput) -> list[dict[str, object]]:
    return [json.loads(record.value) for record in output.sent]


async def test_the_first_token_goes_at_once_after_the_opening_record() -> None:
    output = FakeOutput()
    async with writing(output) as stream:
        stream.started(STARTED)
        stream.delta(token(0))
        await until(lambda: len(output.sent) == 2)
    opening, first = bodies(output)
    assert (opening["epoch"], opening["seed"]) == (3, "5")
    assert (first["seq"], first["token_ids"], first["epoch"]) == ("0", [0], 3)
    assert {(record.key, record.partition) for record in output.sent} == {(b"t-2-9", 2)}


async def test_later_tokens_gather_to_a_count() -> None:
    output = FakeOutput()
    async with writing(output, max_tokens=4) as stream:
        stream.delta(token(0))
        await until(lambda: len(output.sent) == 1)
        for seq in range(1, 5):
            stream.delta(token(seq))
        await until(lambda: len(output.sent) == 2)
    assert (bodies(output)[1]["token_ids"], bodies(output)[1]["text"]) == ([1, 2, 3, 4], "1234")


async def test_later_tokens_go_when_the_interval_has_passed() -> None:
    output = FakeOutput()
    async with writing(output, interval_s=0.01) as stream:
        stream.delta(token(0))
        await until(lambda: len(output.sent) == 1)
        stream.delta(token(1))
        await until(lambda: len(output.sent) == 2)
    assert bodies(output)[1]["seq"] == "1"


async def test_choices_have_sequences_of_their_own() -> None:
    output = FakeOutput()
    async with writing(output) as stream:
        stream.delta(token(0))
        stream.delta(token(0, choice=1))
        stream.delta(token(1, choice=1))
        await stream.finish()
    assert [(body["choice"], body["seq"], body["token_ids"]) for body in bodies(output)] == [(0, "0", [0]), (1, "0", [0, 1])]


async def test_finish_returns_once_every_chunk_is_acknowledged() -> None:
    output = FakeOutput()
    output.hold()
    async with writing(output) as stream:
        stream.delta(token(0))
        stream.delta(token(1))
        finishing = asyncio.create_task(stream.finish())
        await until(lambda: len(output.sent) == 1)
        assert not finishing.done()
        output.release()
        await asyncio.wait_for(finishing, 5)


async def test_a_chunk_that_can_never_be_written_is_left_out() -> None:
    output = FakeOutput(errors=[RequestError("result_too_large", "too large")])
    async with writing(output) as stream:
        stream.delta(token(0))
        await stream.finish()
        stream.delta(token(1))
        await stream.finish()
    assert [body["seq"] for body in bodies(output)] == ["1"]


async def test_a_dropped_stream_writes_nothing_more() -> None:
    output = FakeOutput()
    async with writing(output) as stream:
        stream.started(STARTED)
        stream.drop()
        stream.delta(token(0))
        await stream.finish()
    assert output.sent == []


async def test_what_gathers_while_the_broker_is_away_is_cut_into_records_that_fit() -> None:
    output = FakeOutput()
    async with writing(output, max_tokens=10_000) as stream:
        stream.delta(token(0))
        await until(lambda: len(output.sent) == 1)
        for seq in range(1, 601):
            stream.delta(token(seq))
        await stream.finish()
    assert [(body["seq"], str(body["token_ids"]).count(",") + 1) for body in bodies(output)[1:]] == [
        ("1", 256),
        ("257", 256),
        ("513", 88),
    ]


async def test_a_hand_over_writes_what_was_said_and_a_mark_behind_it() -> None:
    output = FakeOutput()
    async with writing(output, resume_from=(7,)) as stream:
        stream.started(STARTED)
        stream.delta(token(7))
        await until(lambda: len(output.sent) == 2)
        stream.delta(token(8))
        stream.hand_over()
        stream.delta(token(9))
    opening, _, last, mark = bodies(output)
    assert (opening["resume_from"], last["seq"], mark) == (
        ["7"],
        "8",
        {"request_id": "t-2-9", "epoch": 3, "resume_from": ["9"]},
    )


async def test_a_hand_over_before_anything_was_written_leaves_nothing_behind() -> None:
    output = FakeOutput()
    async with writing(output) as stream:
        stream.started(STARTED)
        stream.hand_over()
    assert output.sent == []


async def test_the_listener_hears_of_a_record_only_once_it_is_acknowledged() -> None:
    output, heard, ends = FakeOutput(), Heard(), []
    output.hold()
    async with writing(output, listener=heard, written=ends.append) as stream:
        stream.started(STARTED)
        stream.delta(token(0))
        await until(lambda: len(output.sent) == 2)
        assert (heard.records, ends) == ([], [])
        output.release()
        await stream.finish()
    assert (heard.records, ends) == ([(events_pb2.Started, 0), (events_pb2.Chunk, 1)], [1, 2])
