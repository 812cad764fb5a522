"""One continuation of a request inside the engine: its tokens, its counter and its block table.

A `Sequence` belongs to the `Scheduler`, which alone changes it, at step boundaries. Guarantees: I1
`0 <= num_computed_tokens <= num_tokens`, and nothing is appended after the token that ended it.
Knows no block pool, no policy and no other sequence.
"""

from collections.abc import Iterable
from typing import Literal

from engine.output import FinishReason, SequenceFacts
from engine.request import Request

SayEnd = Literal["stop", "length"]


class Sequence:
    """One choice of a request. `slot` is -1 while it waits; `key` is its place in the policy's order, smaller first.

    `num_scheduled_tokens`: those of chunks under way.
    `num_prefill_tokens`: tokens known when it was last let in; chunks that start below count as prefill.
    `num_sent_blocks`: the prefix of `block_ids` that plans already carried for the present start.
    `num_published_blocks`: the prefix of `block_ids` whose hashes were offered to the pool.
    `num_overtaken`: sequences let in past it while it did not fit.
    """

    __slots__ = (
        "added_ns",
        "arrival",
        "block_hashes",
        "block_ids",
        "choice",
        "first_scheduled_ns",
        "first_token_ns",
        "key",
        "last_token_ns",
        "max_total_tokens",
        "needs_start",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_overtaken",
        "num_preemptions",
        "num_prefill_chunks",
        "num_prefill_tokens",
        "num_prompt_tokens",
        "num_published_blocks",
        "num_scheduled_tokens",
        "num_sent_blocks",
        "num_steps",
        "request",
        "slot",
        "stop_set",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self, request: Request, choice: int, arrival: int, key: tuple[int, int], stop_token_ids: tuple[int, ...], now_ns: int
    ) -> None:
        said = request.output_token_ids[choice] if request.output_token_ids else ()
        self.request = request
        self.choice = choice
        self.arrival = arrival
        self.key = key
        self.stop_token_ids = stop_token_ids
        self.stop_set = frozenset(stop_token_ids)
        self.token_ids: list[int] = [*request.prompt_token_ids, *said]
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.max_total_tokens = self.num_prompt_tokens + request.sampling.max_tokens
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self.num_prefill_tokens = 0
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_sent_blocks = 0
        self.num_published_blocks = 0
        self.slot = -1
        self.needs_start = True
        self.num_overtaken = 0
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.num_prefill_chunks = 0
        self.num_steps = 0
        self.added_ns = now_ns
        self.first_scheduled_ns = 0
        self.first_token_ns = 0
        self.last_token_ns = 0

    @property
    def num_tokens(self) -> int:
        """Prompt tokens and tokens said."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens said, those before a restart included."""
        return len(self.token_ids) - self.num_prompt_tokens

    def say(self, token_ids: Iterable[int]) -> tuple[int, SayEnd | None]:
        """Appends tokens up to and with the one that ends the sequence; gives how many, and why it ended, if it did.

        A stop token counts only once `min_tokens` were said before it; it wins over "length" on the last allowed token.
        """
        own = self.token_ids
        stops_from = self.num_prompt_tokens + self.request.sampling.min_tokens
        count = 0
        for token_id in token_ids:
            own.append(token_id)
            count += 1
            if token_id in self.stop_set and len(own) > stops_from:
                return count, "stop"
            if len(own) >= self.max_total_tokens:
                return count, "length"
        return count, None

    def ended_before(self) -> SayEnd | None:
        """Why the tokens already said end it, or None: what `say` would have answered for the last of them."""
        num_said = self.num_output_tokens
        if num_said > self.request.sampling.min_tokens and self.token_ids[-1] in self.stop_set:
            return "stop"
        return "length" if num_said >= self.request.sampling.max_tokens else None

    def stop_token(self, reason: FinishReason | None) -> int | None:
        """The stop token that ended it, for `reason` "stop"."""
        return self.token_ids[-1] if reason == "stop" else None

    def give_up_slot(self) -> None:
        """Forgets what only held while it ran. The caller has released its blocks."""
        self.block_ids = []
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self.num_published_blocks = 0
        self.slot = -1
        self.start_anew()

    def start_anew(self) -> None:
        """The next plan sends its tokens and its whole block table again."""
        self.needs_start = True
        self.num_sent_blocks = 0

    def facts(self) -> SequenceFacts:
        """What happened to it so far; blocks as held now."""
        return SequenceFacts(
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            num_prefill_chunks=self.num_prefill_chunks,
            num_steps=self.num_steps,
            num_preemptions=self.num_preemptions,
            num_blocks=len(self.block_ids),
            added_ns=self.added_ns,
            first_scheduled_ns=self.first_scheduled_ns,
            first_token_ns=self.first_token_ns,
            last_token_ns=self.last_token_ns,
        )
