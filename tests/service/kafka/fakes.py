"""Stand-ins for what the Kafka transport leans on: a generation that can be held, refused or broken, and a recorded output."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from service.contract import (
    Call,
    ChoiceResult,
    Delta,
    Event,
    Failed,
    Finished,
    LogprobEntry,
    PromptRequest,
    Started,
    Timings,
    Usage,
)
from service.errors import RequestError
from service.kafka.records import OutRecord, TopicPartition

TIMINGS = Timings(queue_ms=1.0, ttft_ms=2.0, tpot_ms=0.5, total_ms=4.0)


@dataclass
class FakeRecord:
    """A consumed record."""

    value: bytes | None
    offset: int = 0
    topic: str = "t.prompts"
    partition: int = 0
    timestamp: int = 1_700_000_000_000
    key: bytes | None = None
    headers: Sequence[tuple[str, bytes]] = ()


class FakeGeneration:
    """Answers every prompt with its own words, one delta each; what a prompt says can hold it or make it fail.

    "hold …": waits until `let_go(text)`. "fail <code>": ends with that code. "refuse <code>": is refused. "break": a fault.
    "huge <n>": answers with n characters. "pause <n> …": waits for `let_all_go` after n words. `answers` has other words for some
    prompts. What was said before is not said again.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[PromptRequest, Call]] = []
        self.answers: dict[str, str] = {}
        self.closed_early: list[str] = []
        self.cancelled: list[str] = []
        self.running = self.paused = 0
        self.most_running = 0
        self._held: dict[str, asyncio.Event] = {}
        self._free = False

    def started_texts(self) -> list[str]:
        return [prompt.text or "" for prompt, _ in self.calls]

    def let_go(self, text: str) -> None:
        self._held.setdefault(text, asyncio.Event()).set()

    def let_all_go(self) -> None:
        self._free = True
        for event in self._held.values():
            event.set()

    def cancel(self, request_id: str) -> bool:
        self.cancelled.append(request_id)
        return any(call.request_id == request_id for _, call in self.calls)

    async def start(self, prompt: PromptRequest, call: Call) -> "FakeStream":
        self.calls.append((prompt, call))
        text = prompt.text or ""
        if text.startswith("refuse "):
            raise RequestError(text.split()[1], "refused by the fake")  # type: ignore[arg-type]
        return FakeStream(self, self._events(prompt, call), call.request_id)

    async def _events(self, prompt: PromptRequest, call: Call) -> AsyncIterator[Event]:
        text = prompt.text or ""
        seed = prompt.sampling.seed or 0
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            yield Started(request_id=call.request_id, model="fake", seed=seed, prompt_tokens=3, trace_id="")
            if text.startswith("break"):
                raise ZeroDivisionError(text)
            if text.startswith("hold") and not self._free:
                await self._held.setdefault(text, asyncio.Event()).wait()
            answer = "x" * int(text.split()[1]) if text.startswith("huge ") else self.answers.get(text, text)
            words = answer.split(" ")
            offset = 0
            already = len(call.said[0]) if call.said else 0
            for index, word in enumerate(words):
                said = word if index == 0 else f" {word}"
                if index < already:
                    offset += len(said)
                    continue
                if text.startswith(f"pause {index} ") and not self._free:
                    self.paused += 1
                    await self._held.setdefault(text, asyncio.Event()).wait()
                yield Delta(choice=0, seq=index, token_ids=(index,), text=said, text_offset=offset)
                offset += len(said)
            usage = Usage(prompt_tokens=3, cached_prompt_tokens=0, completion_tokens=len(words))
            if text.startswith("fail "):
                error = RequestError(text.split()[1], "failed by the fake")  # type: ignore[arg-type]
                yield Failed(error=error, choices=(), usage=usage, timings=TIMINGS, seed=seed, trace_id="")
                return
            logprobs = (
                (LogprobEntry(token_id=0, token="y" * 5_000, logprob=-0.5),) if prompt.sampling.logprobs is not None else None
            )
            choice = ChoiceResult(
                index=0, text=answer, token_ids=tuple(range(len(words))), finish_reason="stop", logprobs=logprobs
            )
            yield Finished(choices=(choice,), usage=usage, timings=TIMINGS, seed=seed, trace_id="")
        finally:
            self.running -= 1


class FakeStream:
    """The events of one fake generation."""

    def __init__(self, owner: FakeGeneration, events: AsyncIterator[Event], request_id: str) -> None:
        self._owner, self._events, self._request_id = owner, events, request_id
        self._ended = False

    def __aiter__(self) -> "FakeStream":
        return self

    async def __anext__(self) -> Event:
        event = await anext(self._events)
        self._ended = isinstance(event, Finished | Failed)
        return event

    async def aclose(self) -> None:
        if not self._ended:
            self._owner.closed_early.append(self._request_id)
        await self._events.aclose()  # type: ignore[attr-defined]


@dataclass
class FakeOutput:
    """Keeps what is sent; `hold()` leaves answers open until `release()`; `errors` are raised first, one a send.

    `answers`: how the next records sent are answered, with an error or (None) as usual.
    """

    sent: list[OutRecord] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    answers: list[Exception | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._gate = asyncio.Event()
        self._gate.set()

    def hold(self) -> None:
        self._gate.clear()

    def release(self) -> None:
        self._gate.set()

    async def send(self, record: OutRecord) -> "asyncio.Future[int]":
        if self.errors:
            raise self.errors.pop(0)
        self.sent.append(record)
        answer = self._answer(len(self.sent) - 1, self.answers.pop(0) if self.answers else None)
        return asyncio.ensure_future(answer)

    async def _answer(self, offset: int, error: Exception | None) -> int:
        await self._gate.wait()
        if error is not None:
            raise error
        return offset


async def until(condition: object, *, within_s: float = 20.0) -> None:
    """Waits until `condition()` is true. Fails when it does not become so within the bound."""
    assert callable(condition)
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.01)


class NoOffsets:
    """For a committer that is to commit nothing."""

    async def commit(self, points: Mapping[TopicPartition, tuple[int, str]]) -> None:
        raise AssertionError
