"""Where a durable request stands, how its result is found, and its chunks live and past."""

import asyncio

import pytest

from schemas.v1 import events_pb2, inference_pb2
from service.contract import Source
from service.errors import RequestError
from service.kafka import request_log
from service.kafka.reader_fold import Terminal
from service.kafka.request_log import RequestLog
from tests.service.kafka.fake_log import NOW_MS, TOPICS, FakeLog, FakeTail

WAIT_S = 20.0


class Bench:
    def __init__(self, *, silence_s: float = 30.0) -> None:
        self.log = FakeLog()
        self.tail = FakeTail(self.log)
        self.requests = RequestLog(self.log, self.tail, TOPICS, wall_ns=lambda: NOW_MS * 1_000_000, silence_s=silence_s)  # type: ignore[arg-type]

    async def read(self, request_id: str) -> list[object]:
        place = await self.requests.place(request_id)
        return [message async for message in self.requests.messages(place)]


def started(source: Source, epoch: int = 1) -> events_pb2.Started:
    return events_pb2.Started(request_id=source.request_id, epoch=epoch, attempt=1, resume_from=[0])


def chunk(source: Source, seq: int) -> events_pb2.Chunk:
    return events_pb2.Chunk(request_id=source.request_id, epoch=1, attempt=1, seq=seq, token_ids=[seq])


async def refusal(bench: Bench, request_id: str) -> str:
    with pytest.raises(RequestError) as caught:
        await bench.requests.place(request_id)
    assert (caught.value.code, caught.value.field) == ("unknown_request", "request_id")
    return caught.value.message


async def test_the_committed_progress_says_what_has_ended() -> None:
    bench = Bench()
    sources = [bench.log.prompt() for _ in range(4)]
    bench.log.low, bench.log.done = 1, 0b10
    assert [(await bench.requests.place(source.request_id)).ended for source in sources] == [True, False, True, False]
    bench.log.low = -1
    assert not (await bench.requests.place(sources[0].request_id)).ended


@pytest.mark.parametrize(
    ("request_id", "words"),
    [
        ("", "topic-partition-offset"),
        ("t.prompts-0", "topic-partition-offset"),
        ("t.results-0-0", "topic-partition-offset"),
        ("t.prompts-1-0", "no partition 1"),
        ("t.prompts-0-12", "ends at offset 12"),
        ("t.prompts-0-9", "begins at offset 10"),
        ("t.prompts-0-11", "tombstone"),
    ],
)
async def test_an_id_without_a_prompt_says_why(request_id: str, words: str) -> None:
    bench = Bench()
    bench.log.begins[TOPICS.prompts] = 10
    bench.log.prompt()
    bench.log.write(TOPICS.prompts, None)
    assert words in await refusal(bench, request_id)


async def test_a_result_is_found_from_the_prompts_time_on_and_remembered() -> None:
    bench = Bench()
    old = [bench.log.prompt(time_ms=1_000) for _ in range(50)]
    for source in old:
        bench.log.result(source, time_ms=1_000)
    source = bench.log.prompt()
    wanted = bench.log.result(source)
    bench.log.low = 51
    place = await bench.requests.place(source.request_id)
    bench.log.reads = 0
    assert (await bench.requests.result(place)).result == wanted
    assert bench.log.reads == 1
    assert (await bench.requests.result(place)).result == wanted
    assert bench.log.reads == 1


async def test_a_result_older_than_its_prompts_clock_is_found_all_the_same() -> None:
    bench = Bench()
    source = bench.log.prompt()
    wanted = bench.log.result(source, time_ms=1_000)
    bench.log.low = 1
    assert (await bench.requests.result(await bench.requests.place(source.request_id))).result == wanted


async def test_a_result_that_is_gone_is_not_looked_for_behind_later_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "MAX_WINDOW", 2)
    bench = Bench()
    sources = [bench.log.prompt() for _ in range(40)]
    for source in sources[1:]:
        bench.log.result(source)
    bench.log.low = 40
    place = await bench.requests.place(sources[0].request_id)
    bench.log.reads = 0
    with pytest.raises(RequestError, match="its result is gone"):
        await bench.requests.result(place)
    assert bench.log.reads == 3


async def test_remembered_results_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    results = [inference_pb2.Result(request_id=f"t.prompts-0-{number}", label="x" * 100) for number in range(10)]
    monkeypatch.setattr(request_log, "MAX_RESULTS_BYTES", 3 * results[0].ByteSize())
    for result in results:
        bench.requests.remember(Terminal(result=result))
    assert [number for number in range(10) if bench.requests.remembered(f"t.prompts-0-{number}")] == [7, 8, 9]


async def test_a_running_request_is_read_from_its_first_chunk_on_and_to_its_result() -> None:
    bench = Bench()
    source, other = bench.log.prompt(), bench.log.prompt()
    bench.log.say(other, started(other))
    bench.log.say(source, started(source))
    bench.log.say(source, chunk(source, 0))
    bench.log.chunk_low = 1
    reading = asyncio.create_task(bench.read(source.request_id))
    await asyncio.wait_for(bench.tail.opened.wait(), WAIT_S)
    bench.log.say(source, chunk(source, 1))
    result = bench.log.result(source)
    bench.tail.feed()
    messages = await asyncio.wait_for(reading, WAIT_S)
    assert messages == [started(source), chunk(source, 0), chunk(source, 1), Terminal(result=result)]


async def test_a_watch_that_lapses_costs_no_chunk_and_repeats_none() -> None:
    bench = Bench()
    source = bench.log.prompt()
    bench.log.say(source, started(source))
    reading = asyncio.create_task(bench.read(source.request_id))
    for number, broken in enumerate((False, True, False)):
        await asyncio.wait_for(bench.tail.opened.wait(), WAIT_S)
        bench.tail.opened.clear()
        bench.log.say(source, chunk(source, number))
        bench.tail.lapse(broken=broken)
    await asyncio.wait_for(bench.tail.opened.wait(), WAIT_S)
    result = bench.log.result(source)
    bench.tail.feed()
    messages = await asyncio.wait_for(reading, WAIT_S)
    assert messages == [started(source), *(chunk(source, number) for number in range(3)), Terminal(result=result)]


async def test_a_result_that_no_watch_has_seen_is_found_after_a_silence() -> None:
    bench = Bench(silence_s=0.01)
    source = bench.log.prompt()
    reading = asyncio.create_task(bench.read(source.request_id))
    await asyncio.wait_for(bench.tail.opened.wait(), WAIT_S)
    result = bench.log.result(source)
    bench.log.low = 1
    assert await asyncio.wait_for(reading, WAIT_S) == [Terminal(result=result)]


async def test_a_result_that_stands_uncommitted_before_the_watch_is_found() -> None:
    bench = Bench()
    source = bench.log.prompt()
    result = bench.log.result(source)
    assert await asyncio.wait_for(bench.read(source.request_id), WAIT_S) == [Terminal(result=result)]


async def test_a_result_that_is_too_large_is_read_from_its_chunks() -> None:
    bench = Bench()
    source = bench.log.prompt()
    for message in (started(source), chunk(source, 0), chunk(source, 1)):
        bench.log.say(source, message)
    error = inference_pb2.Error(code="result_too_large", message="read its chunks")
    result = bench.log.result(source, status=inference_pb2.Result.failed, error=error)
    bench.log.low = 1
    messages = await asyncio.wait_for(bench.read(source.request_id), WAIT_S)
    assert messages == [started(source), chunk(source, 0), chunk(source, 1), Terminal(result=result)]


async def test_an_id_belongs_to_kafka_by_its_form() -> None:
    owns = Bench().requests.owns
    ids = ["t.prompts-0-1", "t.prompts.batch-0-1", "t.results-0-1", "t.prompts-0-x", "0190c6ae-0000-7000-8000-000000000000", ""]
    assert [request_id for request_id in ids if owns(request_id)] == ids[:2]
