"""Lanes: what goes into a transaction, and what is done when one is lost, refused, or ended by another owner."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiokafka.errors import KafkaConnectionError, MessageSizeTooLargeError, TopicAuthorizationFailedError
from aiokafka.structs import OffsetAndMetadata

from service.kafka.committer import Committer
from service.kafka.completion import Completion
from service.kafka.ownership import OwnedPartition
from service.kafka.records import OutRecord, TopicPartition
from service.kafka.tracker import PartitionTracker, Progress, decode, encode
from service.kafka.transactional import TransactionalCommitter
from service.kafka.transactions import LostError, RefusedError
from service.telemetry.metrics import Metrics
from tests.service.kafka.fakes import FakeOutput, NoOffsets, until

PARTITION = TopicPartition("t", 0)
SMALLER = OutRecord(topic="results", value=b"smaller")


def result(offset: int) -> OutRecord:
    return OutRecord(topic="results", value=b"%d" % offset)


class Cluster:
    """A broker's view of one partition: what was committed, and one answer for each of the next transactions.

    An answer is an error (None: it lands), or ("landed", error): it lands, and the answer is lost.
    """

    def __init__(self) -> None:
        self.log: list[bytes] = []
        self.point = OffsetAndMetadata(0, encode(Progress(epoch=1)))
        self.answers: list[Any] = []
        self.refused: set[bytes] = set()
        self.refusal: Exception = MessageSizeTooLargeError("too large")
        self.standing = [True]
        self.reopened: list[TopicPartition] = []
        self.events: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def progress(self, partition: TopicPartition) -> OffsetAndMetadata:
        self.events.append("progress")
        return self.point

    async def in_good_standing(self) -> bool:
        standing = self.standing.pop(0) if len(self.standing) > 1 else self.standing[0]
        self.events.append("standing" if standing else "no standing")
        return standing

    def reopen(self, partition: TopicPartition) -> None:
        self.reopened.append(partition)

    def retire(self, owned: OwnedPartition) -> None:
        self.events.append("retire")
        owned.retire()


class FakeTransactions:
    """One producer after another; unusable after any failure, as the real one."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.usable = False

    async def fence(self) -> None:
        self._cluster.events.append("fence")
        self.usable = True

    async def close(self) -> None:
        self.usable = False

    async def commit(self, partition: TopicPartition, records: Sequence[OutRecord], point: tuple[int, str]) -> Sequence[int]:
        assert self.usable
        cluster = self._cluster
        await cluster.gate.wait()
        for index, record in enumerate(records):
            if record.value in cluster.refused:
                self.usable = False
                raise RefusedError(index, cluster.refusal)
        answer = cluster.answers.pop(0) if cluster.answers else None
        landed = answer is None or isinstance(answer, tuple)
        if landed:
            cluster.log += [record.value for record in records]
            cluster.point = OffsetAndMetadata(*point)
            cluster.events.append("landed")
        if answer is not None:
            self.usable = False
            raise answer[1] if landed else answer
        return range(len(cluster.log) - len(records), len(cluster.log))


class Bench:
    """A committer with one open partition whose first six offsets are running."""

    def __init__(self) -> None:
        self.cluster = Cluster()
        self.output = FakeOutput()
        self.plain = Committer(self.output, NoOffsets(), interval_s=0.001)
        self.committer = TransactionalCommitter(
            self._make, self.cluster, without_progress=self.plain, interval_s=0.001, metrics=Metrics().kafka
        )
        self.owned = OwnedPartition(PARTITION, PartitionTracker(low=0, epoch=1))
        self.settled: list[tuple[int, bool]] = []
        self.written: list[int] = []
        for offset in range(6):
            self.owned.tracker.take(offset)

    def _make(self, partition: TopicPartition) -> Any:
        return FakeTransactions(self.cluster)

    def submit(self, *offsets: int, replacement: Callable[[int], tuple[OutRecord, ...]] = lambda num_taken: (SMALLER,)) -> None:
        for offset in offsets:
            self.committer.submit(
                Completion(
                    owned=self.owned,
                    offset=offset,
                    records=(result(offset),),
                    replacement=replacement,
                    settled=lambda durable, offset=offset: self.settled.append((offset, durable)),
                    written=self.written.extend,
                )
            )

    def committed(self) -> tuple[int, int]:
        """(low, done-bits)."""
        return self.cluster.point.offset, decode(self.cluster.point.metadata).done


@asynccontextmanager
async def running() -> AsyncIterator[Bench]:
    bench = Bench()
    task = asyncio.create_task(bench.committer.run())
    try:
        await bench.committer.fence(PARTITION)
        bench.owned.open()
        bench.committer.opened(bench.owned)
        bench.cluster.events.clear()
        yield bench
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_gathers_during_a_transaction_goes_together_into_the_next() -> None:
    async with running() as bench:
        bench.cluster.gate.clear()
        bench.submit(0)
        await asyncio.sleep(0)
        bench.submit(2, 3, 1)
        bench.cluster.gate.set()
        assert await bench.committer.flush(10)
    assert bench.cluster.log == [b"0", b"2", b"3", b"1"]
    assert bench.committed() == (4, 0)
    assert (
        decode(bench.cluster.point.metadata).commits
        == bench.owned.tracker.commits
        == len([event for event in bench.cluster.events if event == "landed"])
    )


async def test_done_bits_out_of_order_ride_in_the_same_transaction() -> None:
    async with running() as bench:
        bench.submit(3)
        assert await bench.committer.flush(10)
        assert (bench.cluster.log, bench.committed(), bench.written) == ([b"3"], (0, 0b1000), [0])


async def test_a_lost_transaction_that_did_not_land_is_done_again() -> None:
    async with running() as bench:
        bench.cluster.answers = [LostError("cut")]
        bench.submit(0)
        assert await bench.committer.flush(10)
    assert (bench.cluster.log, bench.settled) == ([b"0"], [(0, True)])
    assert bench.cluster.events == ["standing", "fence", "progress", "landed"]


async def test_a_lost_transaction_that_landed_is_not_done_again() -> None:
    async with running() as bench:
        bench.cluster.answers = [("landed", LostError("cut"))]
        bench.submit(0)
        assert await bench.committer.flush(10)
        bench.submit(1)
        assert await bench.committer.flush(10)
    assert (bench.cluster.log, bench.settled) == ([b"0", b"1"], [(0, True), (1, True)])
    assert bench.committed() == (2, 0)


async def test_nobody_is_fenced_before_the_group_has_answered() -> None:
    async with running() as bench:
        bench.cluster.standing = [False, False, True]
        bench.cluster.answers = [LostError("fenced", fenced=True)]
        bench.submit(0)
        assert await bench.committer.flush(10)
    assert bench.cluster.events == ["no standing", "no standing", "standing", "fence", "progress", "landed"]


async def test_a_partition_that_had_another_owner_begins_anew_and_writes_nothing() -> None:
    async with running() as bench:
        bench.cluster.answers = [LostError("fenced", fenced=True)]
        bench.cluster.point = OffsetAndMetadata(0, encode(Progress(epoch=2)))
        bench.submit(0)
        await until(lambda: bench.settled == [(0, False)])
    assert (bench.cluster.log, bench.cluster.reopened) == ([], [PARTITION])


async def test_a_record_refused_for_its_size_is_found_and_replaced_and_its_neighbours_are_written() -> None:
    async with running() as bench:
        bench.cluster.refused = {b"2"}
        bench.cluster.gate.clear()
        bench.submit(0)
        await asyncio.sleep(0)
        bench.submit(1, 2, 3, 4)
        bench.cluster.gate.set()
        assert await bench.committer.flush(10)
    assert sorted(bench.cluster.log) == [b"0", b"1", b"3", b"4", b"smaller"]
    assert bench.committed() == (5, 0)


async def test_a_record_that_nothing_can_replace_is_set_aside_and_holds_only_its_own_offset() -> None:
    async with running() as bench:
        bench.cluster.refused, bench.cluster.refusal = {b"1"}, TopicAuthorizationFailedError("dlq")
        bench.submit(0, 1, 2)
        await until(lambda: len(bench.settled) == 2)
        assert (sorted(bench.cluster.log), bench.committed()) == ([b"0", b"2"], (1, 0b10))
        assert not await bench.committer.flush(0.01)
    assert bench.settled[-1] == (1, False)


async def test_nothing_is_written_while_the_owner_is_being_decided() -> None:
    async with running() as bench:
        bench.owned.revoke()
        bench.submit(0)
        assert not await bench.committer.flush(0.05)
        assert bench.cluster.log == []
        bench.owned.open()
        bench.committer.opened(bench.owned)
        assert await bench.committer.flush(10)
    assert bench.cluster.log == [b"0"]


async def test_a_lost_partition_settles_what_is_left_as_lost() -> None:
    async with running() as bench:
        bench.owned.revoke()
        bench.submit(0, 1)
        bench.owned.lose()
        await until(lambda: len(bench.settled) == 2)
        bench.submit(2)
    assert (bench.cluster.log, bench.settled) == ([], [(0, False), (1, False), (2, False)])


async def test_a_broker_that_is_away_is_asked_until_it_answers() -> None:
    async with running() as bench:
        failures = [KafkaConnectionError("away"), TimeoutError()]
        progress = bench.cluster.progress

        async def away(partition: TopicPartition) -> OffsetAndMetadata:
            if failures:
                raise failures.pop()
            return await progress(partition)

        bench.cluster.progress = away  # type: ignore[method-assign]
        bench.cluster.answers = [LostError("cut")]
        bench.submit(0)
        assert await bench.committer.flush(20)
    assert bench.cluster.log == [b"0"]


async def test_a_result_of_a_deleted_topic_is_written_without_progress() -> None:
    async with running() as bench:
        bench.cluster.gate.clear()
        bench.cluster.answers = [LostError("no such topic")]
        bench.submit(0)
        await asyncio.sleep(0)
        bench.submit(1)
        bench.cluster.point = OffsetAndMetadata(-1, "")
        bench.cluster.gate.set()
        assert await bench.committer.flush(10)
        await until(lambda: len(bench.settled) == 2)
        bench.submit(2)
        assert await bench.committer.flush(10)
    assert bench.cluster.events == ["standing", "fence", "progress", "retire"]
    assert ([record.value for record in bench.output.sent], bench.cluster.log) == ([b"0", b"1", b"2"], [])
    assert bench.settled == [(0, True), (1, True), (2, True)]


async def test_an_idle_lane_ends_when_its_topic_is_deleted() -> None:
    async with running() as bench:
        (lane,) = bench.owned._kept
        bench.owned.retire()
        await asyncio.wait_for(lane, 10)
        bench.submit(0)
        assert await bench.committer.flush(10)
        assert [record.value for record in bench.output.sent] == [b"0"]
