"""What a caller asks of the engine: the border type between the service and the engine.

Guarantees: an object of these types holds only values in their documented ranges; anything else raises
`InvalidFieldError` that names the field. Limits that depend on the model are checked in `Engine.add`.
Standard library only. Knows no text: stop strings and templates are the service's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.errors import InvalidFieldError

MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 300
MAX_SEED = 2**63 - 1
MAX_TOKENS = 2**32 - 1
MIN_REPETITION_PENALTY = 0.01
"""Logits are divided by it: near 0 they would be infinite, and the request end with `numeric_error`."""
RANGES = {
    "max_tokens": "must lie in [1, 2^32 - 1]",
    "min_tokens": "must lie in [0, max_tokens]",
    "seed": "must lie in [0, 2^63 - 1]",
    "top_k": "must be -1 or 0 (off), or a count below 2^31",
    "logprobs": f"must lie in [0, {MAX_LOGPROBS}]",
    "n": f"must lie in [1, {MAX_CHOICES}]",
}
"""The whole numbers of `SamplingParams` and where they lie, in words: the same wherever they are checked."""


def _require(condition: bool, field_name: str, message: str) -> None:
    if not condition:
        raise InvalidFieldError(field_name, message)


def _whole(condition: bool, name: str) -> None:
    _require(condition, f"sampling.{name}", RANGES[name])


def _in_range(value: float, low: float, high: float, field_name: str, *, open_low: bool = False) -> None:
    inside = math.isfinite(value) and (low < value if open_low else low <= value) and value <= high
    bracket = "(" if open_low else "["
    _require(inside, field_name, f"must lie in {bracket}{low:g}, {high:g}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen. Ranges as in vLLM's OpenAI-compatible server, `MIN_REPETITION_PENALTY` apart.

    `temperature` 0 is greedy. `top_k` 0 or -1 is off. `logprobs` None gives none, 0 the chosen token's alone, k the k best
    beside it. `seed` is always set: a draw is a function of (seed, choice, output position) and of nothing else.
    Penalties count output tokens (and prompt tokens for `repetition_penalty`), tokens already said included.
    """

    max_tokens: int
    seed: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        _whole(1 <= self.max_tokens <= MAX_TOKENS, "max_tokens")
        _whole(0 <= self.min_tokens <= self.max_tokens, "min_tokens")
        _whole(0 <= self.seed <= MAX_SEED, "seed")
        _in_range(self.temperature, 0.0, 2.0, "sampling.temperature")
        _in_range(self.top_p, 0.0, 1.0, "sampling.top_p", open_low=True)
        _whole(-1 <= self.top_k < 2**31, "top_k")
        _in_range(self.min_p, 0.0, 1.0, "sampling.min_p")
        _in_range(self.presence_penalty, -2.0, 2.0, "sampling.presence_penalty")
        _in_range(self.frequency_penalty, -2.0, 2.0, "sampling.frequency_penalty")
        _in_range(self.repetition_penalty, MIN_REPETITION_PENALTY, 2.0, "sampling.repetition_penalty")
        _require(len(self.logit_bias) <= MAX_LOGIT_BIAS, "sampling.logit_bias", f"takes at most {MAX_LOGIT_BIAS} tokens")
        for bias in self.logit_bias.values():
            _in_range(bias, -100.0, 100.0, "sampling.logit_bias")
        _require(
            len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
            "sampling.stop_token_ids",
            f"takes at most {MAX_STOP_TOKEN_IDS} ids",
        )
        if self.logprobs is not None:
            _whole(0 <= self.logprobs <= MAX_LOGPROBS, "logprobs")
        _whole(1 <= self.n <= MAX_CHOICES, "n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how to continue it; immutable.

    `output_token_ids` holds, one entry a choice, the tokens already said before a restart or hand-over: they count as
    output for penalties, minimum and maximum, positions and usage, never as prompt. Empty: nothing said yet.
    `ended_choices` had finished before that: they are not continued and say nothing more.
    `cache_salt` separates prefix caches (tenants); `priority`: lower runs first under the `priority` policy.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    output_token_ids: tuple[tuple[int, ...], ...] = ()
    ended_choices: tuple[int, ...] = ()
    cache_salt: str = ""
    priority: int = 0

    def __post_init__(self) -> None:
        _require(bool(self.request_id), "request_id", "must not be empty")
        _require(bool(self.prompt_token_ids), "prompt", "must hold at least one token")
        if self.output_token_ids:
            _require(
                len(self.output_token_ids) == self.sampling.n, "output_token_ids", "must have one entry a choice (sampling.n)"
            )
            _require(
                all(0 <= choice < self.sampling.n for choice in self.ended_choices),
                "ended_choices",
                "must name choices below sampling.n",
            )
            said = max(len(ids) for ids in self.output_token_ids)
            _require(said <= self.sampling.max_tokens, "output_token_ids", "must not be longer than sampling.max_tokens")
