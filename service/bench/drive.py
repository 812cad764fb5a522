"""Sends requests in a closed loop (so many in flight) or an open one (at given instants) and stamps what comes back.

Guarantees: in an open loop latency counts from the instant at which a request was due, not from when it could be sent, so that a stall
of the endpoint or of this process is not left out of the figures (coordinated omission). What was measured so far is always there:
an interrupted run loses only what was in flight. Clock and sleep are injected; seconds.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from service.bench.lengths import Draw, exponential
from service.bench.target import Answer, Target, TargetError
from service.bench.workload import Planned

MAX_IN_FLIGHT = 4_096
"""Of an open loop. Beyond it requests are sent late, which their latency shows."""

TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request. Stamps in seconds of the run's clock; `arrivals`: one (stamp, tokens) a message that brought tokens.

    `answer` None: it failed, with `code`: the endpoint's word, "timeout", or the name of an exception that nobody expected.
    """

    due_s: float
    sent_s: float
    ended_s: float
    arrivals: tuple[tuple[float, int], ...]
    answer: Answer | None
    code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When a run ends: after `max_requests`, or nothing new after `duration_s` (0: no such limit); `timeout_s` for each request."""

    max_requests: int = 0
    duration_s: float = 0.0
    timeout_s: float = 120.0


class Drive:
    """One run against `target`. `samples` grows as requests end."""

    def __init__(
        self,
        target: Target,
        requests: Iterator[Planned],
        limits: Limits,
        *,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._target = target
        self._requests = requests
        self._limits = limits
        self._clock, self._sleep = clock, sleep
        self._num_taken = 0
        self.num_in_flight = 0
        self.samples: list[Sample] = []
        self.started_s = 0.0

    async def closed(self, concurrency: int) -> None:
        """`concurrency` requests in flight; the next is due when one ends."""
        self.started_s = self._clock()

        async def one_after_another() -> None:
            while (planned := self._next()) is not None:
                await self._one(planned, self._clock())

        async with asyncio.TaskGroup() as tasks:
            for _ in range(concurrency):
                tasks.create_task(one_after_another())

    async def open(self, rate: float, uniform: Draw) -> None:
        """Poisson arrivals at `rate` a second."""
        self.started_s = due_s = self._clock()
        room = asyncio.Semaphore(MAX_IN_FLIGHT)

        async def one(planned: Planned, due_s: float) -> None:
            try:
                await self._one(planned, due_s)
            finally:
                room.release()

        async with asyncio.TaskGroup() as tasks:
            while True:
                due_s += exponential(rate, uniform)
                if (planned := self._next(due_s)) is None:
                    return
                if (wait_s := due_s - self._clock()) > 0:
                    await self._sleep(wait_s)
                await room.acquire()
                tasks.create_task(one(planned, due_s))

    def _next(self, due_s: float | None = None) -> Planned | None:
        limits = self._limits
        if limits.max_requests and self._num_taken >= limits.max_requests:
            return None
        now_s = self._clock() if due_s is None else due_s
        if limits.duration_s and now_s - self.started_s >= limits.duration_s:
            return None
        self._num_taken += 1
        return next(self._requests)

    async def _one(self, planned: Planned, due_s: float) -> None:
        arrivals: list[tuple[float, int]] = []
        clock = self._clock
        sent_s = clock()
        answer, code = None, ""
        self.num_in_flight += 1
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                answer = await self._target.ask(planned, lambda num_tokens: arrivals.append((clock(), num_tokens)))
        except TargetError as error:
            code = error.code
        except TimeoutError:
            code = TIMEOUT
        except Exception as error:  # noqa: BLE001 - a fault of one request, whatever it is, must not cost the run its figures
            code = type(error).__name__
        finally:
            self.num_in_flight -= 1
        self.samples.append(
            Sample(due_s=due_s, sent_s=sent_s, ended_s=clock(), arrivals=tuple(arrivals), answer=answer, code=code)
        )


async def warm_up(target: Target, requests: Iterator[Planned], count: int, timeout_s: float) -> None:
    """`count` requests at once whose figures nobody keeps. Raises `TargetError` when the first that fails does."""
    if not count:
        return
    try:
        async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as tasks:
            for _ in range(count):
                tasks.create_task(_uncounted(target, next(requests)))
    except* TargetError as errors:
        raise _first(errors) from None
    except* TimeoutError:
        raise TargetError(TIMEOUT, f"nothing had ended after {timeout_s:g} s") from None


async def _uncounted(target: Target, planned: Planned) -> None:
    try:
        await target.ask(planned, lambda num_tokens: None)
    except TargetError:
        raise
    except Exception as error:
        raise TargetError(type(error).__name__, str(error)) from error


def _first(errors: BaseExceptionGroup[TargetError]) -> TargetError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, TargetError)
    return error
