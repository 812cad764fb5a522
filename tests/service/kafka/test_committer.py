"""Terminal records before offsets, and neither for a partition that is not ours."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from aiokafka.errors import CommitFailedError, KafkaConnectionError

from service.errors import RequestError
from service.kafka.committer import Committer
from service.kafka.completion import Completion
from service.kafka.ownership import OwnedPartition
from service.kafka.records import OutRecord, TopicPartition
from service.kafka.tracker import PartitionTracker
from tests.service.kafka.fakes import FakeOutput, until

RESULT = OutRecord(topic="results", value=b"r")
SMALLER = OutRecord(topic="results", value=b"s")


class FakeOffsets:
    """Takes commits, unless told to refuse the next."""

    def __init__(self) -> None:
        self.commits: list[Mapping[TopicPartition, tuple[int, str]]] = []
        self.refuse: list[Exception] = []

    async def commit(self, points: Mapping[TopicPartition, tuple[int, str]]) -> None:
        if self.refuse:
            raise self.refuse.pop(0)
        self.commits.append(dict(points))

    def lows(self) -> list[int]:
        return [low for points in self.commits for low, _ in points.values()]


class Bench:
    """A committer on fakes, with one open partition whose first three offsets are running."""

    def __init__(self) -> None:
        self.output, self.offsets = FakeOutput(), FakeOffsets()
        self.committer = Committer(self.output, self.offsets, interval_s=0.001)
        self.owned = OwnedPartition(TopicPartition("t", 0), PartitionTracker(low=0, epoch=1))
        self.owned.open()
        self.settled: list[tuple[int, bool]] = []
        for offset in range(3):
            self.owned.tracker.take(offset)

    def submit(
        self, offset: int, *records: OutRecord, replacement: Callable[[int], tuple[OutRecord, ...]] = lambda num_durable: ()
    ) -> None:
        self.committer.submit(
            Completion(
                owned=self.owned,
                offset=offset,
                records=records,
                replacement=replacement,
                settled=lambda durable: self.settled.append((offset, durable)),
            )
        )


@asynccontextmanager
async def running() -> AsyncIterator[Bench]:
    bench = Bench()
    task = asyncio.create_task(bench.committer.run())
    try:
        yield bench
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_offset_is_committed_only_after_its_result_is_acknowledged() -> None:
    async with running() as bench:
        bench.output.hold()
        bench.submit(0, RESULT)
        await until(lambda: bench.output.sent == [RESULT])
        assert (bench.offsets.commits, bench.settled, bench.owned.tracker.low) == ([], [], 0)
        bench.output.release()
        await until(lambda: bench.offsets.lows() == [1])
        assert bench.settled == [(0, True)]


async def test_completions_out_of_order_commit_bits_then_low() -> None:
    async with running() as bench:
        bench.submit(1, RESULT)
        await until(lambda: bench.offsets.lows() == [0])
        bench.submit(0, RESULT)
        await until(lambda: bench.offsets.lows() == [0, 2])


async def test_a_refused_commit_is_tried_again() -> None:
    async with running() as bench:
        bench.offsets.refuse = [CommitFailedError("rebalanced")]
        bench.submit(0, RESULT)
        await until(lambda: bench.offsets.lows() == [1])


async def test_a_record_that_meets_a_transport_error_is_written_again() -> None:
    async with running() as bench:
        bench.output.errors = [KafkaConnectionError("away"), OSError("gone")]
        bench.submit(0, RESULT)
        await until(lambda: bench.offsets.lows() == [1])
        assert bench.output.sent == [RESULT]


async def test_a_record_refused_for_its_size_is_replaced() -> None:
    async with running() as bench:
        bench.output.errors = [RequestError("result_too_large", "too large")]
        bench.submit(0, RESULT, replacement=lambda num_durable: (SMALLER,))
        await until(lambda: bench.offsets.lows() == [1])
        assert bench.output.sent == [SMALLER]


async def test_a_tombstone_completes_without_a_record() -> None:
    async with running() as bench:
        bench.submit(0)
        await until(lambda: bench.offsets.lows() == [1])
        assert bench.output.sent == []


async def test_nothing_is_written_while_a_partition_is_tentative() -> None:
    async with running() as bench:
        bench.owned.revoke()
        bench.submit(0, RESULT)
        other = OwnedPartition(TopicPartition("t", 1), PartitionTracker(low=0))
        other.open()
        other.tracker.take(0)
        bench.committer.submit(
            Completion(
                owned=other, offset=0, records=(SMALLER,), replacement=lambda num_durable: (), settled=lambda durable: None
            )
        )
        await until(lambda: bench.offsets.lows() == [1])
        assert bench.output.sent == [SMALLER]
        bench.owned.open()
        await until(lambda: bench.offsets.lows() == [1, 1])
        assert bench.output.sent == [SMALLER, RESULT]


async def test_a_lost_partition_is_neither_written_nor_committed() -> None:
    async with running() as bench:
        bench.owned.revoke()
        bench.submit(0, RESULT)
        bench.owned.lose()
        await until(lambda: bench.settled == [(0, False)])
        assert await bench.committer.commit()
        assert (bench.output.sent, bench.offsets.commits) == ([], [])


async def test_flush_waits_for_writes_and_commits() -> None:
    bench = Bench()
    for offset in (2, 0, 1):
        bench.submit(offset, RESULT)
    assert await bench.committer.flush(10)
    assert bench.offsets.lows() == [3]


async def test_flush_commits_again_what_was_refused() -> None:
    bench = Bench()
    bench.offsets.refuse = [CommitFailedError("rebalanced")]
    bench.submit(0, RESULT)
    assert await bench.committer.flush(10)
    assert bench.offsets.lows() == [1]


async def test_flush_waits_for_the_owner_of_a_tentative_partition() -> None:
    bench = Bench()
    bench.submit(0, RESULT)
    await until(lambda: bench.settled == [(0, True)])
    bench.owned.revoke()
    flushing = asyncio.create_task(bench.committer.flush(20))
    await until(lambda: not bench.committer.num_unwritten)
    assert not flushing.done()
    bench.owned.open()
    await asyncio.wait_for(flushing, 10)
    assert bench.offsets.lows() == [1]


async def test_a_durable_record_is_not_written_again_when_the_next_one_fails() -> None:
    async with running() as bench:
        letter = OutRecord(topic="letters", value=b"l")
        bench.output.answers = [None, KafkaConnectionError("away"), None]
        bench.submit(0, RESULT, letter)
        await until(lambda: bench.offsets.lows() == [1])
        assert bench.output.sent == [RESULT, letter, letter]


async def test_only_what_is_not_durable_is_replaced() -> None:
    async with running() as bench:
        asked: list[int] = []

        def replacement(num_durable: int) -> tuple[OutRecord, ...]:
            asked.append(num_durable)
            return (SMALLER,)

        bench.output.answers = [None, RequestError("result_too_large", "too large")]
        bench.submit(0, RESULT, OutRecord(topic="letters", value=b"l"), replacement=replacement)
        await until(lambda: bench.offsets.lows() == [1])
        assert (asked, [record.value for record in bench.output.sent]) == ([1], [b"r", b"l", b"s"])


async def test_a_cancellation_that_comes_together_with_a_commits_answer_ends_the_committer() -> None:
    bench = Bench()
    task = asyncio.create_task(bench.committer.run())
    taken = bench.offsets.commit

    async def commit(points: Mapping[TopicPartition, tuple[int, str]]) -> None:
        await taken(points)
        task.cancel()

    bench.offsets.commit = commit  # type: ignore[method-assign]
    bench.submit(0, RESULT)
    done, _ = await asyncio.wait({task}, timeout=10)
    assert done == {task}


async def test_a_cancellation_that_comes_together_with_a_commits_answer_is_not_lost() -> None:
    bench = Bench()
    task = asyncio.create_task(bench.committer.run())
    take = bench.offsets.commit

    async def commit(points: Mapping[TopicPartition, tuple[int, str]]) -> None:
        await take(points)
        # Before anybody who waits for this answer hears of it: `asyncio.wait_for` would forget it here.
        asyncio.get_running_loop().call_soon(task.cancel)

    bench.offsets.commit = commit  # type: ignore[method-assign]
    bench.submit(0, RESULT)
    _, late = await asyncio.wait({task}, timeout=20.0)
    assert (bench.offsets.lows(), late) == ([1], set())
