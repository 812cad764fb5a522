"""The plan of a step and its result: the border between deciding (scheduling) and executing (the runner).

A step is an ordered list of chunks; a decode is a chunk of one token. Nothing here says which is which.
Standard library only.
"""

from dataclasses import dataclass
from typing import Literal

from engine.output import TokenLogprobs
from engine.request import SamplingParams

Follow = Literal["nothing", "single tokens", "anything"]
"""What a plan may hold that is executed behind one whose tokens are not known yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceStart:
    """A sequence takes a slot: the runner replaces whatever the slot held before.

    Sent when a sequence is let in, and again after a preemption. `token_ids` are all tokens known so far: the prompt
    (`num_prompt_tokens` of them), then the tokens said. `stop_token_ids` are masked until `sampling.min_tokens` are said.
    """

    slot: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    choice: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Compute `num_tokens` tokens of the sequence in `slot`, from position `start` on.

    `new_block_ids` are appended to the slot's block table before the step; the table then covers start + num_tokens.
    `samples`: the chunk ends at the sequence's last known token, so the next one is drawn from its logits.
    `follows`: its one token is what the step before draws in this slot; it may still be on its way to the host.
    """

    slot: int
    start: int
    num_tokens: int
    new_block_ids: tuple[int, ...]
    samples: bool
    follows: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What the next step computes. Chunks of one token stand first; starts come before the chunks that use their slots."""

    step: int
    starts: tuple[SequenceStart, ...]
    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkResult:
    """What one chunk gave: 0, 1 or many tokens (speculative decoding needs no other type).

    `finite` is False when the row's logits held NaN or no finite value: the sequence ends alone with `numeric_error`.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finite: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One result a chunk of the plan, in its order."""

    chunks: tuple[ChunkResult, ...]
