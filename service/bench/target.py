"""What a load is sent to: one protocol, and what every endpoint's answer comes down to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from service.bench.workload import Planned

TEMPERATURE = 0.0
"""Of every request: greedy, so that lengths and speed do not depend on chance."""

OnTokens = Callable[[int], None]
"""Told how many tokens have just come; whoever is told takes the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A request that ended well. `engine_ttft_s`: from first scheduled to the first token, where the endpoint says so."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int = 0
    engine_ttft_s: float | None = None


class TargetError(Exception):
    """A request that did not end well. `code`: the endpoint's own word where it has one; counted in the report."""

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(message or code)
        self.code = code


class Target(Protocol):
    """An endpoint. Its own requests can be asked at the same time; cancelling one ends it there, too."""

    async def open(self) -> dict[str, Any]:
        """Connects; gives what is known of the endpoint, for the report. Raises `SetupError` when nobody answers."""
        ...

    async def ask(self, planned: Planned, on_tokens: OnTokens) -> Answer:
        """One request, to its end. Raises `TargetError`."""
        ...

    async def close(self) -> None:
        """Idempotent."""
        ...
