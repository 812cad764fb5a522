"""A target and a clock for the driver, without a network or real time."""

import asyncio
import heapq
import itertools
from typing import Any

from service.bench.target import Answer, OnTokens, TargetError
from service.bench.workload import Planned


class VirtualTime:
    """Sleepers wake in the order of their instants; time is moved only once nobody can run."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._order), future))
        await future

    async def run(self, work: Any) -> None:
        """Runs `work` to its end, moving time."""
        running = asyncio.ensure_future(work)
        try:
            while not running.done():
                for _ in range(20):
                    await asyncio.sleep(0)
                if self._sleepers and not running.done():
                    self.now, _, future = heapq.heappop(self._sleepers)
                    future.set_result(None)
            running.result()
        finally:
            running.cancel()


class FakeTarget:
    """Serves one request at a time (`places`) in `seconds`; `failing` indices end with a code. `stalls`: {index: extra seconds}."""

    def __init__(
        self,
        time: VirtualTime,
        *,
        seconds: float = 1.0,
        places: int = 1_000,
        failing: dict[int, str] | None = None,
        stalls: dict[int, float] | None = None,
    ) -> None:
        self._time, self._seconds = time, seconds
        self._places = asyncio.Semaphore(places)
        self._failing, self._stalls = failing or {}, stalls or {}
        self.asked: list[Planned] = []
        self.most_at_once = self._now_asked = 0

    async def open(self) -> dict[str, Any]:
        return {"target": "fake"}

    async def ask(self, planned: Planned, on_tokens: OnTokens) -> Answer:
        self.asked.append(planned)
        self._now_asked += 1
        self.most_at_once = max(self.most_at_once, self._now_asked)
        try:
            async with self._places:
                await self._time.sleep(self._seconds / 2 + self._stalls.get(planned.index, 0.0))
                if code := self._failing.get(planned.index):
                    raise TargetError(code)
                on_tokens(1)
                await self._time.sleep(self._seconds / 2)
                on_tokens(planned.max_tokens - 1)
        finally:
            self._now_asked -= 1
        return Answer(prompt_tokens=len(planned.text.split()), completion_tokens=planned.max_tokens, engine_ttft_s=0.1)

    async def close(self) -> None:
        pass
