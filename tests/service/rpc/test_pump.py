"""When a stream's messages leave, without a network."""

import asyncio

import pytest

from schemas.v1 import inference_pb2
from service.config import GrpcSection
from service.contract import Delta, Finished, Started, Usage
from service.rpc.pump import HandedOver, Pump, SlowReader
from tests.service.rpc.fakes import TIMINGS

USAGE = Usage(prompt_tokens=1, cached_prompt_tokens=0, completion_tokens=1)
STARTED = Started(request_id="r", model="m", seed=1, prompt_tokens=1, trace_id="")
FINISHED = Finished(choices=(), usage=USAGE, timings=TIMINGS, seed=1, trace_id="")
LONG = 60_000


def delta(seq: int, text: str = "x") -> Delta:
    return Delta(choice=0, seq=seq, token_ids=(seq,), text=text, text_offset=seq * len(text))


class Feed:
    """Events that the test gives one by one."""

    def __init__(self, *events) -> None:
        self._queue: asyncio.Queue = asyncio.Queue()
        for event in events:
            self.give(event)

    def give(self, event) -> None:
        self._queue.put_nowait(event)

    def __aiter__(self):
        return self

    async def __anext__(self):
        event = await self._queue.get()
        if event is None:
            raise StopAsyncIteration
        if isinstance(event, Exception):
            raise event
        return event


class Wire:
    """What was written; `gate` holds writes back."""

    def __init__(self) -> None:
        self.messages: list[inference_pb2.StreamEvent] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.changed = asyncio.Event()

    async def write(self, message: inference_pb2.StreamEvent) -> None:
        self.messages.append(message)
        self.changed.set()
        await self.gate.wait()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.messages) < count:
                self.changed.clear()
                await self.changed.wait()


def kinds(wire: Wire) -> list[str]:
    return [message.WhichOneof("event") for message in wire.messages]


async def test_the_first_token_leaves_at_once_and_later_ones_gather():
    wire, feed = Wire(), Feed(STARTED, delta(0))
    pump = Pump(GrpcSection(coalesce_ms=LONG), "r", wire.write)
    running = asyncio.create_task(pump.run(feed))
    await wire.until(2)
    for seq in range(1, 5):
        feed.give(delta(seq))
    feed.give(FINISHED)
    assert await asyncio.wait_for(running, 10) is FINISHED
    assert kinds(wire)[0] == "started"
    assert [list(m.delta.token_ids) for m in wire.messages if m.HasField("delta")] == [[0], [1, 2, 3, 4]]
    assert kinds(wire)[-1] == "finished"
    assert (pump.num_merges, pump.num_tokens_sent) == (3, 5)


async def test_what_comes_while_a_write_waits_leaves_as_one_message():
    wire, feed = Wire(), Feed(STARTED)
    running = asyncio.create_task(Pump(GrpcSection(coalesce_ms=0), "r", wire.write).run(feed))
    await wire.until(1)
    wire.gate.clear()
    feed.give(delta(0))
    await wire.until(2)
    for seq in range(1, 9):
        feed.give(delta(seq))
    feed.give(FINISHED)
    await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)
    wire.gate.set()
    await asyncio.wait_for(running, 10)
    assert [list(m.delta.token_ids) for m in wire.messages if m.HasField("delta")] == [[0], list(range(1, 9))]


async def test_at_the_bound_the_generation_is_read_no_further():
    wire, taken = Wire(), []

    async def endless():
        yield STARTED
        for seq in range(10_000):
            taken.append(seq)
            yield delta(seq, "y" * 1000)

    wire.gate.clear()
    pump = Pump(GrpcSection(stream_buffer_bytes=4096, slow_reader_timeout_s=0.1), "r", wire.write)
    with pytest.raises(SlowReader):
        await asyncio.wait_for(pump.run(endless()), 10)
    assert len(taken) <= 6


async def test_a_hand_over_sends_what_waits_and_then_where_to_go_on():
    wire, feed = Wire(), Feed(STARTED, delta(0))
    pump = Pump(GrpcSection(coalesce_ms=LONG), "r", wire.write)
    running = asyncio.create_task(pump.run(feed))
    await wire.until(2)
    feed.give(delta(1))
    for _ in range(20):
        await asyncio.sleep(0)
    pump.hand_over()
    with pytest.raises(HandedOver):
        await asyncio.wait_for(running, 10)
    assert kinds(wire)[-2:] == ["delta", "reset"]
    assert list(wire.messages[-1].reset.resume_from) == [2]


@pytest.mark.parametrize("end", [ValueError("broken"), None])
async def test_a_generation_that_ends_without_a_terminal_event_is_an_error_after_what_it_said(end):
    wire = Wire()
    with pytest.raises((ValueError, RuntimeError)):
        await asyncio.wait_for(Pump(GrpcSection(), "r", wire.write).run(Feed(STARTED, delta(0), end)), 10)
    assert kinds(wire) == ["started", "delta"]


async def test_a_cancelled_pump_leaves_no_reader_behind():
    wire, feed = Wire(), Feed(STARTED)
    before = asyncio.all_tasks()
    running = asyncio.create_task(Pump(GrpcSection(), "r", wire.write).run(feed))
    await wire.until(1)
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    assert asyncio.all_tasks() <= before
