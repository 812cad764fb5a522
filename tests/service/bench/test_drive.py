"""Closed and open loops on a virtual clock."""

import asyncio
import itertools
import random

import pytest

from service.bench.drive import TIMEOUT, Drive, Limits, warm_up
from service.bench.lengths import Lengths
from service.bench.run import Bench, Plan, SweepError
from service.bench.summary import Targets, summarize
from service.bench.target import TargetError
from service.bench.workload import Workload
from tests.service.bench.fakes import FakeTarget, VirtualTime

WORKLOAD = Workload(lengths=Lengths(shape="fixed", prompt_tokens=5, output_tokens=4))


def requests():
    return WORKLOAD.requests(lambda stream: random.Random(stream).random, "0")


def drive(target: FakeTarget, time: VirtualTime, **limits: float) -> Drive:
    return Drive(target, requests(), Limits(**limits), clock=time, sleep=time.sleep)  # type: ignore[arg-type]


async def test_a_closed_loop_keeps_so_many_in_flight_until_all_are_sent() -> None:
    time = VirtualTime()
    target = FakeTarget(time)
    run = drive(target, time, max_requests=10)
    await time.run(run.closed(4))
    assert (len(run.samples), target.most_at_once, time.now) == (10, 4, 3.0)
    assert [planned.index for planned in target.asked] == list(range(10))


@pytest.mark.parametrize(("requests", "loads"), [(12, [0.0, 0.5, 1.0]), (4, [0.0])])
async def test_a_sweep_needs_a_closed_loop_that_tells_its_rate(requests: int, loads: list[float]) -> None:
    """Four in flight: of twelve eight have ended when the last is sent; of four none."""
    time = VirtualTime()
    plan = Plan(workload=WORKLOAD, limits=Limits(max_requests=requests), concurrency=4, loads=(0.5, 1.0))
    work = Bench(plan, FakeTarget(time), new_draw=lambda stream: random.Random(stream).random, clock=time, sleep=time.sleep)
    if len(loads) == 1:
        with pytest.raises(SweepError, match="4 in flight"):
            await time.run(work.execute())
    else:
        await time.run(work.execute())
    assert [run.load for run in work.runs] == loads


async def test_a_run_that_is_interrupted_keeps_what_was_asked_of_it() -> None:
    time = VirtualTime()
    plan = Plan(workload=WORKLOAD, limits=Limits(max_requests=12), concurrency=4, loads=(0.5,))
    work = Bench(plan, FakeTarget(time), new_draw=lambda stream: random.Random(stream).random, clock=time, sleep=time.sleep)
    running = asyncio.create_task(time.run(work.execute()))
    while not work.runs or work.current is None or not work.current.samples:  # noqa: ASYNC110 - what is waited for tells nobody
        await asyncio.sleep(0)
    running.cancel()
    part = work.interrupted()
    assert part is not None
    assert (part.concurrency, part.rate, part.load) == (0, 0.5 * work.runs[0].summary.steady_requests_per_s, 0.5)


async def test_a_duration_ends_the_sending_and_waits_for_what_was_sent() -> None:
    time = VirtualTime()
    run = drive(FakeTarget(time), time, duration_s=2.5)
    await time.run(run.closed(2))
    assert (len(run.samples), time.now) == (6, 3.0)


async def test_an_open_loop_sends_on_time_whatever_the_endpoint_does() -> None:
    time = VirtualTime()
    target = FakeTarget(time, places=1, seconds=5.0)
    run = drive(target, time, max_requests=20)
    await time.run(run.open(10.0, itertools.repeat(0.5).__next__))
    gap_s = run.samples[0].due_s
    assert [sample.due_s for sample in run.samples] == pytest.approx([gap_s * (i + 1) for i in range(20)])
    assert [sample.sent_s for sample in run.samples] == pytest.approx([sample.due_s for sample in run.samples])


async def test_a_stall_counts_for_every_request_that_was_due_meanwhile() -> None:
    """One place, 0.1 s each, due every 0.2 s; the first stalls for 2 s. Measured from sending one by one, only one would be slow."""
    time = VirtualTime()
    target = FakeTarget(time, places=1, seconds=0.1, stalls={0: 2.0})
    run = drive(target, time, max_requests=30)
    await time.run(run.open(5.0, lambda: 1 - 2.718281828459045**-1))
    slow = [sample for sample in run.samples if sample.ended_s - sample.due_s > 0.3]
    assert len(slow) > 10


async def test_a_request_that_fails_is_counted_by_its_code_and_the_run_goes_on() -> None:
    time = VirtualTime()
    run = drive(FakeTarget(time, failing={1: "overloaded", 3: "overloaded", 4: "internal"}), time, max_requests=6)
    await time.run(run.closed(1))
    summary = summarize(run.samples, run.started_s, Targets())
    assert (summary.num_requests, summary.num_finished) == (6, 3)
    assert summary.errors == {"internal": 1, "overloaded": 2}


class Faulty(FakeTarget):
    """Its second answer is not what anybody expects."""

    async def ask(self, planned, on_tokens):
        if planned.index == 1:
            raise KeyError("usage")
        return await super().ask(planned, on_tokens)


async def test_a_fault_that_nobody_expected_is_that_requests_alone() -> None:
    time = VirtualTime()
    run = drive(Faulty(time), time, max_requests=3)
    await time.run(run.closed(1))
    assert [sample.code for sample in run.samples] == ["", "KeyError", ""]
    assert run.num_in_flight == 0


async def test_a_fault_of_the_warm_up_is_told_as_one() -> None:
    time = VirtualTime()
    with pytest.raises(TargetError, match="usage") as failed:
        await time.run(warm_up(Faulty(time), requests(), 2, 10.0))
    assert failed.value.code == "KeyError"


async def test_a_load_that_is_asked_for_twice_gets_other_requests_and_arrivals() -> None:
    time = VirtualTime()
    target = FakeTarget(time)
    plan = Plan(workload=WORKLOAD, limits=Limits(max_requests=12), concurrency=4, loads=(0.5, 0.5))
    streams: list[str] = []

    def new_draw(stream: str):
        streams.append(stream)
        return random.Random(stream).random

    work = Bench(plan, target, new_draw=new_draw, clock=time, sleep=time.sleep)
    await time.run(work.execute())
    _, first, again = (target.asked[at : at + 12] for at in (0, 12, 24))
    assert {planned.text for planned in first}.isdisjoint(planned.text for planned in again)
    arrivals = [stream for stream in streams if stream.startswith("arrivals")]
    assert len(set(arrivals)) == 2


async def test_a_request_that_never_ends_is_a_timeout() -> None:
    class Silent(FakeTarget):
        async def ask(self, planned, on_tokens):
            await asyncio.Event().wait()

    time = VirtualTime()
    run = drive(Silent(time), time, max_requests=2, timeout_s=0.01)
    await run.closed(2)
    assert [sample.code for sample in run.samples] == [TIMEOUT, TIMEOUT]


async def test_what_ended_before_an_interruption_is_kept() -> None:
    class FallsSilent(FakeTarget):
        silent = asyncio.Event()

        async def ask(self, planned, on_tokens):
            if planned.index == 3:
                self.silent.set()
                await asyncio.Event().wait()
            return await super().ask(planned, on_tokens)

    time = VirtualTime()
    target = FallsSilent(time)
    run = drive(target, time, max_requests=1_000)
    running = asyncio.create_task(time.run(run.closed(1)))
    await target.silent.wait()
    running.cancel()
    await asyncio.wait({running})
    assert [sample.ended_s for sample in run.samples] == [1.0, 2.0, 3.0]


async def test_a_warm_up_that_fails_says_so() -> None:
    time = VirtualTime()
    with pytest.raises(TargetError, match="unknown_model"):
        await time.run(warm_up(FakeTarget(time, failing={2: "unknown_model"}), requests(), 4, 10.0))
