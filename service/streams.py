"""Hands each step's outputs to the requests that they belong to: one inbox a request, owned here.

Bounded by construction: an inbox holds at most the tokens that its request may say (n x max_tokens) and one signal, because nothing
else is ever put into it. Dispatch never waits for a reader, so one slow request never holds up another. Knows tokens, no text.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from engine import StepOutput, TokenOutput
from service.errors import Code


@dataclass(frozen=True, slots=True)
class Signal:
    """Not from the engine: the request shall end with this code."""

    code: Code


class Inbox:
    """What came for one request and was not taken yet, in order. One reader."""

    __slots__ = ("_arrived", "_items")

    def __init__(self) -> None:
        self._items: list[TokenOutput | Signal] = []
        self._arrived = asyncio.Event()

    def put(self, item: TokenOutput | Signal) -> None:
        self._items.append(item)
        self._arrived.set()

    async def take(self) -> list[TokenOutput | Signal]:
        """Everything that has come, at least one item; waits for the first."""
        await self._arrived.wait()
        self._arrived.clear()
        items, self._items = self._items, []
        return items


class Streams:
    """The open requests of one engine. `on_step` sees every step of the engine first (metrics); it must not block."""

    def __init__(self, on_step: Callable[[StepOutput], None] | None = None) -> None:
        self._inboxes: dict[str, Inbox] = {}
        self._on_step = on_step
        self._ended = False

    def __len__(self) -> int:
        return len(self._inboxes)

    def open(self, request_id: str) -> Inbox:
        """The inbox of a new request; open it before the engine gets the request. Raises `ValueError` for an id that is open."""
        if request_id in self._inboxes:
            raise ValueError(f"request {request_id} is open already")
        inbox = self._inboxes[request_id] = Inbox()
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
                for output in step.outputs:
                    inbox = self._inboxes.get(output.request_id)
                    if inbox is not None:
                        inbox.put(output)
        finally:
            self._ended = True
            for inbox in self._inboxes.values():
                inbox.put(Signal("engine_failed"))
