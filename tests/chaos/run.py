"""One run: brokers, replicas and prompts, faults by plan, rest, and the history of all of it."""

import asyncio
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from confluent_kafka import Message

from tests.chaos import recorder
from tests.chaos.checker import Verdict, check
from tests.chaos.faults import Faults
from tests.chaos.history import Acknowledged, History, View
from tests.chaos.plan import Plan
from tests.chaos.prompts import make_prompt
from tests.chaos.publisher import Publisher
from tests.chaos.run_clock import RunClock
from tests.chaos.scene import Scene, Stage, scene

_POLL_S = 0.3


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a run gave. `at_rest`: whether every prompt had its terminal record before the time for it was over."""

    plan: Plan
    history: History
    verdict: Verdict
    at_rest: bool
    faults: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.verdict.ok and self.at_rest and not self.faults["crashes"]


def emptied(directory: Path) -> None:
    """Makes it, without what an earlier run left there."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


async def run(
    on: Stage,
    plan: Plan,
    directory: Path,
    *,
    at_least_once: bool = False,
    overrides: dict[str, Any] | None = None,
    mutant: str = "",
    prefix: str = "chaos.",
    settle_s: float = 120.0,
) -> Outcome:
    """Carries the plan out and judges it. `directory` (there already) gets the history and the replicas' logs."""
    began = time.monotonic()
    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        nonlocal began
        now = time.monotonic()
        seconds[name], began = round(now - began, 1), now

    async with scene(on, plan.shape, directory, overrides=overrides, mutant=mutant, prefix=prefix) as here:
        lap("topics")
        await here.start_replicas()
        lap("replicas")
        clock, answered = RunClock(), _Answered()
        faults = Faults(here, plan, clock)
        along = recorder.ReaderAlong(here.bootstrap, prefix, on_result=answered.add)
        along.start()
        publisher = _publisher(here, plan, clock)
        publisher.start()
        await faults.run()
        await asyncio.to_thread(publisher.join)
        lap("faults")
        at_rest = await _rest(publisher.acknowledged, answered, settle_s)
        lap("rest")
        stops = await asyncio.gather(*(replica.terminate() for replica in here.replicas))
        faults.crashes += [fault for fault in stops if fault]
        lap("stop")
        history = History(acknowledged=publisher.acknowledged, prompts_topic=here.topic("prompts"))
        history.barriers = faults.barriers + await here.barrier("end")
        history.seen += await asyncio.to_thread(along.finish)
        await asyncio.to_thread(_read, here, history)
        lap("reading")
    history.save(directory / "history.jsonl.gz")
    verdict = check(history, at_least_once=at_least_once)
    lap("checking")
    return Outcome(plan=plan, history=history, verdict=verdict, at_rest=at_rest, faults=faults.summary(), seconds=seconds)


class _Answered:
    """(partition, offset) of the prompts whose terminal record was seen; told by the reader's thread."""

    def __init__(self) -> None:
        self.places: set[tuple[int, int]] = set()

    def add(self, partition: int, offset: int) -> None:
        self.places.add((partition, offset))


def _publisher(here: Scene, plan: Plan, clock: RunClock) -> Publisher:
    shape = plan.shape

    def prompt(index: int) -> Any:
        return make_prompt(
            plan.seed,
            index,
            partitions=shape.partitions,
            min_tokens=shape.min_tokens,
            max_tokens=shape.max_tokens,
            bad=shape.bad_prompts,
        )

    return Publisher(
        here.bootstrap, here.topic("prompts"), prompt, clock, count=shape.prompts, duration_s=shape.duration_s * 0.95
    )


async def _rest(acknowledged: list[Acknowledged], answered: _Answered, settle_s: float) -> bool:
    wanted = {(one.partition, one.offset) for one in acknowledged if one.kind != "tombstone"}
    deadline, missing = time.monotonic() + settle_s, len(wanted)
    while missing:
        left = len(wanted - answered.places)
        if left < missing:
            # As long as something comes, it is not over.
            missing, deadline = left, time.monotonic() + settle_s
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_POLL_S)
    return True


def _read(here: Scene, history: History) -> None:
    views: tuple[tuple[View, str, tuple[str, ...]], ...] = (
        ("committed", "read_committed", ("results", "dlq")),
        ("uncommitted", "read_uncommitted", ("results", "dlq", "chunks")),
    )
    for view, isolation, topics in views:
        for topic in topics:
            messages: list[Message] = recorder.read_all(here.bootstrap, here.topic(topic), isolation=isolation)
            history.seen += [recorder.seen(message, view, here.prefix) for message in messages]
    history.committed = recorder.commits_of(here.bootstrap, here.group, history.prompts_topic)
