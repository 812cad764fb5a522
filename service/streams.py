"""Hands each step's outputs to the requests that they belong to: one inbox a request, owned here.

Bounded by construction: an inbox holds at most the tokens that its request may say (n x max_tokens) and one signal, because nothing
else is ever put into it. Dispatch never waits for a reader, so one slow request never holds up another. Knows tokens, no text.

Readers are woken together and not for each token: a wake-up runs two or three tasks and writes a message, which costs the engine's own
cores 0.1 to 0.2 ms. First and last tokens wake their reader at once; the others at most once in a pace, with the step that comes after
it, and after two paces where no step does. Steps longer than a pace so wake everyone each time.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from engine import PlainTokens, StepOutput, TokenOutput
from service.errors import Code


@dataclass(frozen=True, slots=True)
class Signal:
    """Not from the engine: the request shall end with this code."""

    code: Code


class _Run:
    """Tokens of one choice that followed one another, with nothing else."""

    __slots__ = ("choice", "seq", "token_ids")

    def __init__(self, choice: int, seq: int, token_id: int) -> None:
        self.choice, self.seq, self.token_ids = choice, seq, [token_id]


class Inbox:
    """What came for one request and was not taken yet, in order; plain tokens that follow one another as one output. One reader."""

    __slots__ = ("_arrived", "_items", "_request_id", "eager", "run")

    def __init__(self, request_id: str, *, eager: bool = False) -> None:
        self._request_id = request_id
        self._items: list[TokenOutput | Signal | _Run] = []
        self._arrived = asyncio.Event()
        self.eager = eager
        self.run: _Run | None = None
        """The last that came, when that is one: what follows may be added to it."""

    def put(self, item: TokenOutput | Signal) -> None:
        """Adds an item and wakes the reader."""
        self.hold(item)
        self._arrived.set()

    def hold(self, item: TokenOutput | Signal) -> None:
        """Adds an item for whoever wakes the reader next."""
        self._items.append(item)
        self.run = None

    def begin(self, run: _Run) -> None:
        """Adds a token that follows no run, for whoever wakes the reader next."""
        self._items.append(run)
        self.run = run

    def wake(self) -> None:
        """Wakes the reader when something is there."""
        if self._items:
            self._arrived.set()

    async def take(self) -> list[TokenOutput | Signal]:
        """Everything that has come, at least one item; waits for the first."""
        await self._arrived.wait()
        self._arrived.clear()
        items, self._items, self.run = self._items, [], None
        return [self._output(item) if isinstance(item, _Run) else item for item in items]

    def _output(self, run: _Run) -> TokenOutput:
        return TokenOutput(request_id=self._request_id, choice=run.choice, seq=run.seq, token_ids=tuple(run.token_ids))


class Streams:
    """The open requests of one engine. `on_step` sees every step of the engine first (metrics); it must not block.

    `pace_s`: readers are woken for tokens between their first and last at most this often; 0: for each. `max_wakes_per_s` bounds all
    readers together: with more of them than a pace has room for, each is woken less often.
    """

    def __init__(
        self,
        on_step: Callable[[StepOutput], None] | None = None,
        *,
        pace_s: float = 0.0,
        max_wakes_per_s: float = math.inf,
    ) -> None:
        self._inboxes: dict[str, Inbox] = {}
        self._on_step = on_step
        self._ended = False
        self._pace_s = pace_s
        self._max_wakes_per_s = max_wakes_per_s
        self._held: dict[Inbox, None] = {}
        self._woken_s = -math.inf
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._inboxes)

    def open(self, request_id: str, *, eager: bool = False) -> Inbox:
        """The inbox of a new request; open it before the engine gets the request. Raises `ValueError` for an id that is open.

        `eager`: its reader is woken for each token, since any may end it (stop strings).
        """
        if request_id in self._inboxes:
            raise ValueError(f"request {request_id} is open already")
        inbox = self._inboxes[request_id] = Inbox(request_id, eager=eager or not self._pace_s)
        if self._ended:
            inbox.put(Signal("engine_failed"))
        return inbox

    def close(self, request_id: str) -> None:
        """Nothing more is kept for this request; unknown ids are ignored."""
        self._inboxes.pop(request_id, None)

    async def run(self, outputs: AsyncIterator[StepOutput]) -> None:
        """Dispatches until the engine's outputs end; then whoever is still open is told that it failed."""
        try:
            async for step in outputs:
                # Ends that the supervisor gives stand for no step.
                if self._on_step is not None and step.stats.step:
                    self._on_step(step)
                self._say(step.plain)
                for output in step.outputs:
                    inbox = self._inboxes.get(output.request_id)
                    if inbox is not None:
                        self._deliver(inbox, output)
                if self._held:
                    self._wake_in_time()
        finally:
            self._ended = True
            if self._timer is not None:
                self._timer.cancel()
            for inbox in self._inboxes.values():
                inbox.put(Signal("engine_failed"))

    def _deliver(self, inbox: Inbox, output: TokenOutput) -> None:
        # Facts come with a choice's first token and its last.
        if inbox.eager or output.facts is not None or output.finish_reason is not None:
            inbox.put(output)
            self._held.pop(inbox, None)
        else:
            inbox.hold(output)
            self._held[inbox] = None

    def _say(self, plain: PlainTokens) -> None:
        inboxes, held = self._inboxes, self._held
        for request_id, choice, seq, token_id in zip(
            plain.request_ids, plain.choices, plain.seqs, plain.token_ids, strict=True
        ):
            inbox = inboxes.get(request_id)
            if inbox is None:
                continue
            run = inbox.run
            if run is not None and run.choice == choice:
                run.token_ids.append(token_id)
                continue
            inbox.begin(_Run(choice, seq, token_id))
            if inbox.eager:
                inbox.wake()
            else:
                held[inbox] = None

    def _wake_in_time(self) -> None:
        """After a step: wakes who is held, or sees to it that somebody will."""
        loop = asyncio.get_running_loop()
        pace_s = max(self._pace_s, len(self._inboxes) / self._max_wakes_per_s)
        if loop.time() >= self._woken_s + pace_s:
            self._wake_held()
        elif self._timer is None:
            self._timer = loop.call_at(self._woken_s + 2 * pace_s, self._wake_held)

    def _wake_held(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._woken_s = asyncio.get_running_loop().time()
        held, self._held = self._held, {}
        for inbox in held:
            inbox.wake()
