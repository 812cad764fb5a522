"""Runs one after another against one target: a closed loop, an open one, or a closed one and then open ones at shares of its rate.

What has been measured is in `Bench.runs` and `Bench.current` at any moment, for whoever shows progress or interrupts it.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from service.bench.drive import Drive, Limits, warm_up
from service.bench.lengths import Draw
from service.bench.summary import Summary, Targets, summarize
from service.bench.target import Target
from service.bench.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run. `rate` (requests a second) opens the loop; `loads` are shares of what the closed loop reached."""

    workload: Workload
    limits: Limits
    concurrency: int = 16
    rate: float = 0.0
    loads: tuple[float, ...] = ()
    warm_up: int = 0
    targets: Targets = field(default_factory=Targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run's figures. `concurrency` of a closed loop, else 0; `rate` of an open one, `load` its share of the closed one's."""

    name: str
    summary: Summary
    concurrency: int = 0
    rate: float = 0.0
    load: float = 0.0


class SweepError(Exception):
    """The closed loop was too short to say what a share of its rate is."""


class Bench:
    """`execute` runs the plan; `new_draw` gives the uniform draws of a named stream, the same each time."""

    def __init__(
        self,
        plan: Plan,
        target: Target,
        *,
        new_draw: Callable[[str], Draw],
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._plan, self.target = plan, target
        self._new_draw, self._clock, self._sleep = new_draw, clock, sleep
        self.runs: list[Run] = []
        self.current: Drive | None = None
        self.current_name = ""
        self._offered: dict[str, Any] = {}

    @property
    def num_runs(self) -> int:
        """Of the whole plan."""
        return len(self._plan.loads) + 1

    async def execute(self) -> None:
        """Raises `TargetError` when the warm-up fails, `SweepError`; requests that fail later are counted."""
        plan = self._plan
        self.current_name = "warm-up"
        await warm_up(self.target, plan.workload.requests(self._new_draw, "warm-up"), plan.warm_up, plan.limits.timeout_s)
        if plan.rate:
            await self._open(f"{plan.rate:g} a second", plan.rate, 0.0)
            return
        closed = (await self._closed()).summary
        if plan.loads and closed.num_steady < plan.concurrency:
            raise SweepError(
                f"{closed.num_steady} requests ended before the last was sent, which tells no rate at {plan.concurrency} in flight"
            )
        for load in plan.loads:
            await self._open(f"{load:.0%} load", load * closed.steady_requests_per_s, load)

    def interrupted(self) -> Run | None:
        """The run under way, with what has ended so far; None where nothing has."""
        drive, self.current = self.current, None
        if drive is None or not drive.samples:
            return None
        return self._run(f"{self.current_name} (interrupted)", drive)

    async def _closed(self) -> Run:
        concurrency = self._plan.concurrency
        drive = self._begin(f"{concurrency} in flight", "closed", {"concurrency": concurrency})
        await drive.closed(concurrency)
        return self._end(drive)

    async def _open(self, name: str, rate: float, load: float) -> None:
        drive = self._begin(name, name, {"rate": rate, "load": load})
        await drive.open(rate, self._new_draw(f"arrivals {len(self.runs)} {name}"))
        self._end(drive)

    def _begin(self, name: str, stream: str, offered: dict[str, Any]) -> Drive:
        # A load that is asked for twice gets other requests the second time, which no prefix cache knows.
        requests = self._plan.workload.requests(self._new_draw, f"requests {len(self.runs)} {stream}")
        self.current_name, self._offered = name, offered
        self.current = Drive(self.target, requests, self._plan.limits, clock=self._clock, sleep=self._sleep)
        return self.current

    def _end(self, drive: Drive) -> Run:
        run = self._run(self.current_name, drive)
        self.runs.append(run)
        self.current = None
        return run

    def _run(self, name: str, drive: Drive) -> Run:
        return Run(name=name, summary=summarize(drive.samples, drive.started_s, self._plan.targets), **self._offered)
