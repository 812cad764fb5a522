"""The prompts of a run: a pure function of (seed, index), with what a faultless service would answer to each.

The expectation is computed here again from the published rule (SplitMix64 over BLAKE2b of seed, choice and prompt), not taken from
the engine's code: a checker that asked the code under test would agree with its faults.
"""

import json
import random
from array import array
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

VOCABULARY = 266
"""Of `tests/service/tiny_tokenizer.py`: 3 control tokens, 256 bytes, 7 merges."""

_FIRST_TOKEN = 64
_MASK = 2**64 - 1

PromptKind = Literal[
    "tokens", "text", "two-choices", "unseeded", "expired", "bad-json", "bad-field", "unknown-field", "tombstone"
]

_WEIGHTS: dict[PromptKind, int] = {
    "tokens": 60,
    "text": 12,
    "two-choices": 6,
    "unseeded": 8,
    "expired": 2,
    "bad-json": 4,
    "bad-field": 3,
    "unknown-field": 2,
    "tombstone": 1,
}

_BAD = ("expired", "bad-json", "bad-field", "unknown-field", "tombstone")

ERROR_CODES: dict[str, str] = {
    "expired": "deadline_exceeded",
    "bad-json": "invalid_json",
    "bad-field": "invalid_field",
    "unknown-field": "unknown_field",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSpec:
    """One prompt record and what must come of it.

    `answers`: the token ids of each choice, empty where they cannot be known here (a seed that the service draws, a text that its
    tokenizer splits). `error`: the code that it must fail with. A tombstone has no terminal record at all.
    """

    index: int
    kind: PromptKind
    partition: int
    value: bytes | None
    headers: dict[str, bytes] = field(default_factory=dict)
    num_tokens: int = 0
    num_choices: int = 1
    answers: tuple[tuple[int, ...], ...] = ()
    error: str = ""


def expected_tokens(prompt: tuple[int, ...], seed: int, choice: int, count: int) -> tuple[int, ...]:
    """What the stand-in engine says: SplitMix64 (Steele, Lea and Flood 2014) at each output position."""
    digest = blake2b(array("q", (seed, choice)).tobytes(), digest_size=8)
    digest.update(array("i", prompt).tobytes())
    state = int.from_bytes(digest.digest(), "little")
    said = []
    for position in range(count):
        z = (state + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        said.append(_FIRST_TOKEN + (z ^ (z >> 31)) % (VOCABULARY - _FIRST_TOKEN))
    return tuple(said)


def make_prompt(seed: int, index: int, *, partitions: int, min_tokens: int, max_tokens: int, bad: int = 1) -> PromptSpec:
    """The prompt number `index` of a run, answered with `min_tokens` to `max_tokens` tokens; `bad` times as many bad ones as usual."""
    draw = random.Random(f"{seed}-{index}")
    weights = {name: weight * (bad if name in _BAD else 1) for name, weight in _WEIGHTS.items()}
    kind = draw.choices(list(weights), list(weights.values()))[0]
    partition = draw.randrange(partitions)
    count = draw.randint(min_tokens, max_tokens)
    prompt_seed = draw.randrange(2**62)
    ids = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(4, 48)))
    sampling: dict[str, Any] = {"max_tokens": count, "seed": prompt_seed, "ignore_eos": True}
    body: dict[str, Any] = {"token_ids": list(ids), "sampling": sampling, "label": f"chaos-{index}"}
    headers: dict[str, bytes] = {"correlation-id": f"c-{index}".encode()}
    choices, answers, error = 1, (), ERROR_CODES.get(kind, "")
    if kind in ("tokens", "two-choices"):
        choices = 2 if kind == "two-choices" else 1
        if choices > 1:
            sampling["n"] = choices
        answers = tuple(expected_tokens(ids, prompt_seed, choice, count) for choice in range(choices))
    elif kind == "text":
        del body["token_ids"]
        body["prompt"] = f"say something about {index}"
    elif kind == "unseeded":
        del sampling["seed"]
    elif kind == "expired":
        headers["sluice-deadline"] = b"2020-01-01T00:00:00Z"
    elif kind == "bad-field":
        sampling["temperature"] = -1
    elif kind == "unknown-field":
        body["max_new_tokens"] = 3
    value: bytes | None = json.dumps(body).encode()
    if kind == "bad-json":
        value = b'{"prompt": '
    elif kind == "tombstone":
        value = None
    return PromptSpec(
        index=index,
        kind=kind,
        partition=partition,
        value=value,
        headers=headers,
        num_tokens=0 if error or kind == "tombstone" else count,
        num_choices=choices,
        answers=answers,
        error=error,
    )
