"""What readers on this replica are shown of a request that runs here."""

import asyncio

from schemas.v1 import events_pb2, inference_pb2
from service.contract import Source
from service.kafka.cancels import Cancels
from service.kafka.live import LiveRequests
from service.kafka.reader_fold import Terminal

SOURCE = Source(topic="t.prompts", partition=0, offset=1)
ID = SOURCE.request_id
STARTED = events_pb2.Started(request_id=ID, epoch=1)
CHUNK = events_pb2.Chunk(request_id=ID, epoch=1, token_ids=[4])
HANDOVER = events_pb2.Handover(request_id=ID, epoch=1, resume_from=[1])
RESULT = inference_pb2.Result(request_id=ID)


async def test_each_reader_gets_everything_in_order_whenever_it_comes() -> None:
    live = LiveRequests()
    live.acknowledged(SOURCE, STARTED, 7)
    running = live.get(ID)
    assert running is not None
    early = asyncio.create_task(all_of(running.messages()))
    await asyncio.sleep(0)
    live.acknowledged(SOURCE, CHUNK, 8)
    late = asyncio.create_task(all_of(running.messages()))
    await asyncio.sleep(0)
    live.ended(SOURCE, RESULT)
    assert await early == await late == [STARTED, CHUNK, Terminal(result=RESULT)]
    assert live.get(ID) is None


def test_what_was_begun_elsewhere_serves_those_alone_who_have_the_beginning() -> None:
    live = LiveRequests()
    live.acknowledged(SOURCE, events_pb2.Started(request_id=ID, epoch=2, resume_from=[5, 0]), 7)
    running = live.get(ID)
    assert running is not None
    readers = [((), ()), ((4,), (9,)), ((5,), ()), ((5,), (-1,)), ((5,), (9,)), ((7, 3), (0, -1))]
    assert [running.serves(*reader) for reader in readers] == [False, False, False, False, True, True]


async def test_a_request_that_is_handed_over_ends_here_without_a_result() -> None:
    live = LiveRequests()
    live.acknowledged(SOURCE, STARTED, 7)
    running = live.get(ID)
    assert running is not None
    reading = asyncio.create_task(all_of(running.messages()))
    await asyncio.sleep(0)
    live.acknowledged(SOURCE, HANDOVER, 8)
    assert await reading == [STARTED, HANDOVER]
    assert len(live) == 0


def test_what_comes_after_the_end_is_passed_by() -> None:
    live = LiveRequests()
    live.acknowledged(SOURCE, CHUNK, 7)
    live.ended(SOURCE, RESULT)
    assert len(live) == 0


def test_the_oldest_of_too_many_cancels_is_forgotten() -> None:
    heard: list[str] = []
    cancels = Cancels(since_ms=100, max_ids=2, on_cancel=heard.append)
    for request_id in ("a", "b", "a", "c"):
        cancels.add(request_id)
    assert [request_id for request_id in "abc" if cancels.includes(request_id)] == ["a", "c"]
    assert heard == ["a", "b", "a", "c"]


def test_a_prompt_of_no_known_time_moves_nothing() -> None:
    cancels = Cancels(since_ms=100)
    for prompt_ms in (-1, 0, 100, 150):
        cancels.cover(prompt_ms)
    assert (cancels.since_ms, cancels.earlier.is_set()) == (100, False)


async def all_of(messages) -> list:  # type: ignore[no-untyped-def,type-arg]
    return [message async for message in messages]
