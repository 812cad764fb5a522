"""What is measured: batch, context and tokens of each case, and the prompts that every system gets."""

import random
from dataclasses import dataclass

Prompts = list[list[int]]

FIRST_TOKEN, LAST_TOKEN = 1000, 40_000
"""Ordinary tokens of the vocabulary; control tokens lie below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`keep`: the prompts' KV may be kept from block to block, so that a block times decoding alone. Prefill draws anew each block."""

    name: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    keep: bool

    def prompts(self, seed: int, block: int) -> Prompts:
        """The same for every system; the same in every block where they are kept."""
        draw = random.Random(f"{seed}/{self.name}/{'kept' if self.keep else block}")
        return [[draw.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(self.prompt_tokens)] for _ in range(self.batch)]


def _decode(batch: int, context: int, new_tokens: int) -> Case:
    # One token more than the context: prefix caches of 16 and 32 tokens a block then leave one token to compute, not a block. vLLM's
    # CPU backend keeps whole blocks of 128 alone: nothing of 33 tokens, all but one of 513. What it computes again lies before the window.
    return Case(name=f"decode {batch}/{context}", batch=batch, prompt_tokens=context + 1, new_tokens=new_tokens, keep=True)


CASES = {
    case.name: case
    for case in (
        _decode(1, 32, 49),
        _decode(8, 32, 33),
        _decode(32, 32, 17),
        _decode(1, 512, 49),
        _decode(8, 512, 33),
        _decode(32, 512, 17),
        Case(name="prefill 512", batch=1, prompt_tokens=512, new_tokens=1, keep=False),
    )
}
"""Decode is counted in the window where the whole batch decodes: `new_tokens` - 1 steps at most, fewer where a system staggers prompts."""
