"""Who is woken when: first and last tokens at once, the others together."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import pytest

from engine import StepOutput, TokenLogprobs, TokenOutput
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
        self._queue.put_nowait(StepOutput(outputs=outputs, stats=stats(next(self._numbers))).packed())
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
    return positions(task.result())


def positions(items: Sequence[TokenOutput | Signal]) -> list[int]:
    """Of each token."""
    outputs = [item for item in items if isinstance(item, TokenOutput)]
    return [output.seq + index for output in outputs for index in range(len(output.token_ids))]


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
                seen += positions(await inbox.take())
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
        items = await inbox.take()
    assert (positions(items), items[-1]) == ([0, 1, 2], Signal("cancelled"))


async def test_when_the_engine_ends_every_reader_is_told() -> None:
    streams = Streams(pace_s=LONG_S)
    inbox = streams.open("a")

    async def nothing() -> AsyncIterator[StepOutput]:
        return
        yield

    await streams.run(nothing())
    assert await inbox.take() == [Signal("engine_failed")]
    assert await streams.open("b").take() == [Signal("engine_failed")]


def more(seq: int, choice: int = 0, **fields: object) -> TokenOutput:
    return TokenOutput(request_id="a", choice=choice, seq=seq, token_ids=(seq,), **fields)  # type: ignore[arg-type]


async def test_tokens_of_one_choice_that_follow_one_another_come_as_one_output() -> None:
    streams = Streams(pace_s=LONG_S)
    inbox = streams.open("a")
    async with dispatching(streams) as steps:
        for seq in (3, 4, 5):
            await steps.give(more(seq))
        assert await inbox.take() == [TokenOutput(request_id="a", choice=0, seq=3, token_ids=(3, 4, 5))]


async def test_whatever_says_more_than_its_tokens_stays_by_itself_and_in_its_place() -> None:
    streams = Streams(pace_s=LONG_S)
    inbox = streams.open("a")
    first, scored = more(0, facts=facts(1, 1, 1)), more(3, logprobs=(TokenLogprobs(token_id=3, logprob=-1.0),))
    last = more(6, finish_reason="length")
    async with dispatching(streams) as steps:
        for output in (first, more(1), more(2)):
            await steps.give(output)
        inbox.put(Signal("cancelled"))
        for output in (scored, more(4), more(5), last):
            await steps.give(output)
        assert await inbox.take() == [
            first,
            TokenOutput(request_id="a", choice=0, seq=1, token_ids=(1, 2)),
            Signal("cancelled"),
            scored,
            TokenOutput(request_id="a", choice=0, seq=4, token_ids=(4, 5)),
            last,
        ]


async def test_choices_are_never_mixed() -> None:
    streams = Streams(pace_s=LONG_S)
    inbox = streams.open("a")
    outputs = [more(1), more(1, choice=1), more(2)]
    async with dispatching(streams) as steps:
        await steps.give(*outputs)
        assert await inbox.take() == outputs
