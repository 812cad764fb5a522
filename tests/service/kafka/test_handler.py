"""A record's way to its terminal records, apart from any broker."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from service.config import KafkaSection, TracingSection
from service.errors import RequestError
from service.kafka.cancels import Cancels
from service.kafka.committer import Committer
from service.kafka.handler import PromptHandler
from service.kafka.ownership import OwnedPartition
from service.kafka.records import TopicPartition
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
            topics=TOPICS, section=KafkaSection(),
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
