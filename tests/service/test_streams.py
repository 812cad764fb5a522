"""Who is woken when: first and last tokens at once, the others together."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from engine import StepOutput, TokenOutput
from service.streams import Inbox, Signal, Streams
from tests.service.fake_engine import facts, stats

LONG_S, SHORT_S = 600.0, 0.001


def output(request_id: str, seq: int, *, end: bool = False) -> TokenOutput:
    return TokenOutput(
        request_id=request_id,
        choice=0,
        seq=seq,
        token_ids=(seq,),
        finish_reason="length" if end else None,
        facts=facts(1, 1, 1) if seq == 0 or end else None,
    )


class Steps:
    """An engine's outputs, given by the test."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[StepOutput | None] = asyncio.Queue()
        self._numbers: Iterator[int] = iter(range(1, 1_000_000))

    async def give(self, *outputs: TokenOutput) -> None:
        """One step, dispatched when this returns."""
        self._queue.put_nowait(StepOutput(outputs=outputs, stats=stats(next(self._numbers))))
        for _ in range(5):
            await asyncio.sleep(0)

    async def __call__(self) -> AsyncIterator[StepOutput]:
        while (step := await self._queue.get()) is not None:
            yield step


@asynccontextmanager
async def dispatching(streams: Streams) -> AsyncIterator[Steps]:
    steps = Steps()
    running = asyncio.create_task(streams.run(steps()))
    yield steps
    running.cancel()
    await asyncio.wait({running})


async def taken(inbox: Inbox) -> list[int]:
    """The positions that came; [] where its reader is not woken."""
    task = asyncio.create_task(inbox.take())
    for _ in range(5):
        await asyncio.sleep(0)
    if not task.done():
        task.cancel()
        return []
    return [item.seq for item in task.result() if isinstance(item, TokenOutput)]


async def test_first_and_last_tokens_wake_at_once_and_bring_what_was_held() -> None:
    streams = Streams(pace_s=LONG_S)
    inbox = streams.open("a")
    async with dispatching(streams) as steps:
        await steps.give(output("a", 0))
        assert await taken(inbox) == [0]
        await steps.give(output("a", 1))
        assert await taken(inbox) == [1], "a step that comes long after the last wake-up wakes its readers"
        await steps.give(output("a", 2))
        await steps.give(output("a", 3))
        assert await taken(inbox) == []
        await steps.give(output("a", 4, end=True))
        assert await taken(inbox) == [2, 3, 4]


async def test_readers_are_woken_together_when_the_pace_has_passed() -> None:
    """Also when no further step comes."""
    streams = Streams(pace_s=SHORT_S)
    inboxes = [streams.open(name) for name in "ab"]
    async with dispatching(streams) as steps, asyncio.timeout(10):
        for seq in range(20):
            await steps.give(*(output(name, seq) for name in "ab"))
        for inbox in inboxes:
            seen: list[int] = []
            while len(seen) < 20:
                seen += [item.seq for item in await inbox.take() if isinstance(item, TokenOutput)]
            assert seen == list(range(20))


@pytest.mark.parametrize(("pace_s", "eager"), [(0.0, False), (LONG_S, True)])
async def test_without_a_pace_or_with_stop_strings_each_token_wakes(pace_s: float, eager: bool) -> None:
    streams = Streams(pace_s=pace_s)
    inbox = streams.open("a", eager=eager)
    async with dispatching(streams) as steps:
        for seq in range(4):
            await steps.give(output("a", seq))
            assert await taken(inbox) == [seq]


async def test_many_readers_are_each_woken_less_often() -> None:
    streams = Streams(pace_s=1e-9, max_wakes_per_s=2 / LONG_S)
    inboxes = [streams.open(name) for name in "ab"]
    woken = []
    async with dispatching(streams) as steps:
        for seq in range(4):
            await steps.give(*(output(name, seq) for name in "ab"))
            woken.append([await taken(inbox) for inbox in inboxes])
    assert woken == [[[0], [0]], [[1], [1]], [[], []], [[], []]]


async def test_a_signal_wakes_at_once_and_comes_after_what_was_held() -> None:
    streams = Streams(pace_s=LONG_S)
    inbox = streams.open("a")
    async with dispatching(streams) as steps:
        await steps.give(output("a", 0))
        await steps.give(output("a", 1))
        await steps.give(output("a", 2))
        inbox.put(Signal("cancelled"))
        assert [getattr(item, "seq", "signal") for item in await inbox.take()] == [0, 1, 2, "signal"]


async def test_when_the_engine_ends_every_reader_is_told() -> None:
    streams = Streams(pace_s=LONG_S)
    inbox = streams.open("a")

    async def nothing() -> AsyncIterator[StepOutput]:
        return
        yield

    await streams.run(nothing())
    assert await inbox.take() == [Signal("engine_failed")]
    assert await streams.open("b").take() == [Signal("engine_failed")]
