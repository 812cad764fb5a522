"""A record's way to its terminal records, apart from any broker."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from google.protobuf import json_format

from schemas.v1 import inference_pb2
from service.config import KafkaSection, TracingSection
from service.errors import RequestError
from service.kafka.cancels import Cancels
from service.kafka.committer import Committer
from service.kafka.handler import PromptHandler
from service.kafka.idempotency import Known
from service.kafka.ownership import OwnedPartition
from service.kafka.records import TopicPartition
from service.kafka.result_keys import ResultKeys
from service.kafka.topics import Topics
from service.kafka.tracker import PartitionTracker
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import Tracing
from tests.service.kafka.fakes import FakeGeneration, FakeOutput, FakeRecord, until

TOPICS = Topics("t.")
HALF_A_PAIR = "\ud800"


class TakenOffsets:
    """Takes every commit."""

    def __init__(self) -> None:
        self.low = 0

    async def commit(self, points: Mapping[TopicPartition, tuple[int, str]]) -> None:
        ((self.low, _),) = points.values()


class Remembered(ResultKeys):
    """The results that were written, as the results topic would give them back."""

    def __init__(self, output: FakeOutput) -> None:
        self._output = output

    async def result(self, of: TopicPartition, known: Known) -> inference_pb2.Result | None:
        for record in self._output.sent[known.result_offset :]:
            if record.key == known.request_id.encode():
                return json_format.Parse(record.value, inference_pb2.Result())
        return None


class Bench:
    """A handler without chunks on one open partition; `released` counts the budget given back."""

    def __init__(self) -> None:
        self.output, self.offsets, self.generation = FakeOutput(), TakenOffsets(), FakeGeneration()
        self.committer = Committer(self.output, self.offsets, interval_s=0.001)
        self.owned = OwnedPartition(TopicPartition("t.prompts", 0), PartitionTracker(low=0, epoch=1))
        self.owned.open()
        self.released = 0
        self.cancels = Cancels(since_ms=2_000_000_000_000)
        self.handler = PromptHandler(
            generation=self.generation, commits=self.committer, chunks=None, cancels=self.cancels,
            result_keys=Remembered(self.output), topics=TOPICS, section=KafkaSection(),
            spans=Tracing(TracingSection()), metrics=Metrics().kafka, wall_ns=lambda: 1, monotonic_ns=lambda: 1,
        )  # fmt: skip

    async def handle(self, record: FakeRecord) -> None:
        assert self.owned.tracker.take(record.offset)
        await self.handler.handle(record, self.owned, release=self._release)

    def _release(self) -> None:
        self.released += 1


@asynccontextmanager
async def running() -> AsyncIterator[Bench]:
    bench = Bench()
    task = asyncio.create_task(bench.committer.run())
    try:
        yield bench
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_result_that_cannot_be_encoded_ends_as_internal_and_does_not_hold_its_partition() -> None:
    async with running() as bench:
        bench.generation.answers["say half a pair"] = HALF_A_PAIR
        await bench.handle(FakeRecord(value=b'{"prompt": "say half a pair"}'))
        await until(lambda: bench.offsets.low == 1)
    result, letter = bench.output.sent
    assert json.loads(result.value)["error"]["code"] == "internal"
    assert (letter.topic, bench.released) == (TOPICS.dead_letters, 1)


async def test_a_dead_letter_that_its_topic_refuses_is_cut_down_and_the_result_stands() -> None:
    async with running() as bench:
        bench.output.answers = [None, RequestError("result_too_large", "the topic takes less")]
        await bench.handle(FakeRecord(value=b'{"prompt": ""}'))
        await until(lambda: bench.offsets.low == 1)
    assert [record.topic for record in bench.output.sent] == [TOPICS.results, TOPICS.dead_letters, TOPICS.dead_letters]
    whole, cut = (json.loads(record.value) for record in bench.output.sent[1:])
    assert (bool(whole["original_value"]), cut["original_value"]) == (True, "")
    assert {letter["error"]["code"] for letter in (whole, cut)} == {"invalid_field"}


async def test_a_prompt_that_was_cancelled_before_its_turn_ends_as_cancelled_without_a_generation() -> None:
    async with running() as bench:
        bench.cancels.add("t.prompts-0-0")
        await bench.handle(FakeRecord(value=b'{"prompt": "hello"}'))
        await until(lambda: bench.offsets.low == 1)
    (result,) = bench.output.sent
    value = json.loads(result.value)
    assert (value["status"], value["error"]["code"], bench.generation.calls) == ("cancelled", "cancelled", [])


async def test_a_prompt_tells_from_which_time_on_cancels_are_wanted() -> None:
    async with running() as bench:
        await bench.handle(FakeRecord(value=b'{"prompt": "hello"}', timestamp=1_700_000_000_000))
    assert (bench.cancels.since_ms, bench.cancels.earlier.is_set()) == (1_700_000_000_000, True)


def keyed(offset: int, text: str, key: bytes = b"once") -> FakeRecord:
    value = json.dumps({"prompt": text}).encode()
    return FakeRecord(value=value, offset=offset, headers=[("sluice-idempotency-key", key)])


def results(bench: Bench) -> list[dict[str, Any]]:
    return [json.loads(record.value) for record in bench.output.sent if record.topic == TOPICS.results]


async def test_a_prompt_with_a_known_key_gets_the_first_ones_result_and_does_not_run() -> None:
    async with running() as bench:
        await bench.handle(keyed(0, "say it"))
        await until(lambda: bench.offsets.low == 1)
        await bench.handle(keyed(1, "say it"))
        await until(lambda: bench.offsets.low == 2)
    first, second = results(bench)
    assert (first["choices"], first["seed"]) == (second["choices"], second["seed"])
    assert [one["source"]["offset"] for one in (first, second)] == ["0", "1"]
    headers = [dict(record.headers) for record in bench.output.sent]
    assert (headers[0]["sluice-idempotency-key"], headers[1]["sluice-duplicate-of"]) == (b"once", b"t.prompts-0-0")
    assert "sluice-idempotency-key" not in headers[1]
    assert len(bench.generation.calls) == 1


async def test_a_prompt_whose_key_is_running_waits_for_it() -> None:
    async with running() as bench:
        tasks = [asyncio.create_task(bench.handle(keyed(offset, "hold it"))) for offset in range(2)]
        await until(lambda: bench.generation.running == 1)
        bench.generation.let_all_go()
        await asyncio.gather(*tasks)
        await until(lambda: bench.offsets.low == 2)
    assert (len(results(bench)), len(bench.generation.calls), bench.released) == (2, 1, 2)


async def test_a_key_that_failed_runs_again() -> None:
    async with running() as bench:
        await bench.handle(keyed(0, "fail internal"))
        await until(lambda: bench.offsets.low == 1)
        await bench.handle(keyed(1, "fail internal"))
        await until(lambda: bench.offsets.low == 2)
    assert len(bench.generation.calls) == 2


async def test_a_key_of_another_prompt_is_refused_by_name() -> None:
    async with running() as bench:
        await bench.handle(keyed(0, "say it"))
        await until(lambda: bench.offsets.low == 1)
        await bench.handle(keyed(1, "say something else"))
        await until(lambda: bench.offsets.low == 2)
    error = results(bench)[1]["error"]
    assert (error["code"], error["field"]) == ("invalid_field", "headers.sluice-idempotency-key")


async def test_a_result_that_is_gone_from_its_topic_is_made_again() -> None:
    async with running() as bench:
        await bench.handle(keyed(0, "say it"))
        await until(lambda: bench.offsets.low == 1)
        bench.output.sent.clear()
        await bench.handle(keyed(1, "say it"))
        await until(lambda: bench.offsets.low == 2)
    assert len(bench.generation.calls) == 2
