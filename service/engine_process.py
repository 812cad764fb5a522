"""Drives the engine child: the seam between the service and whatever generates."""

from collections.abc import AsyncIterator
from typing import Protocol

from engine import EngineFacts, Request, StepOutput


class EngineClient(Protocol):
    """What the service asks of an engine. Implemented by `EngineProcess`, and by fakes in tests."""

    async def start(self) -> None:
        """Returns once the engine is ready. Raises `SetupError` when it cannot be."""
        ...

    async def submit(self, request: Request) -> None:
        """Hands a request over; its outputs will come, ending in one finish reason a choice, whatever dies."""
        ...

    async def abort(self, request_id: str) -> None:
        """Ends a request at the next step boundary; unknown ids are ignored."""
        ...

    def facts(self) -> EngineFacts:
        """What the ready engine is."""
        ...

    def outputs(self) -> AsyncIterator[StepOutput]:
        """Every step's outputs, in order, for one reader."""
        ...

    async def close(self) -> None:
        """Ends the engine; idempotent."""
        ...
