"""An accepted request while any of its choices lives, and the mark that a caller leaves on it.

Owned by the `Scheduler`. Knows which choices share a prefill: the first live one computes the prompt, its siblings are parked
until its blocks can be found in the prefix cache.
"""

from dataclasses import dataclass
from typing import Literal

from engine.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Mark:
    """How a request ends at the next boundary; `code` and `message` are set for "error"."""

    reason: Literal["cancelled", "error"]
    code: str = ""
    message: str = ""


class LiveRequest:
    """`sequences`: live choices in order. `parked`: those that wait for `leader` to have computed `num_shared_tokens`."""

    __slots__ = ("leader", "mark", "num_shared_tokens", "parked", "sequences")

    def __init__(self, sequences: list[Sequence], parked: list[Sequence], num_shared_tokens: int) -> None:
        self.sequences = sequences
        self.leader = sequences[0]
        self.parked = parked
        self.num_shared_tokens = num_shared_tokens
        self.mark: Mark | None = None
