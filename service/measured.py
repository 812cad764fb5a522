"""A request in numbers: the engine's stamps and counts, folded into usage and timings.

Stamps are CLOCK_MONOTONIC nanoseconds; 0 is "not yet". The first facts of a choice stay (after an engine restart the next child
counts anew, but the caller has waited since the beginning); the last token's stamp is the latest known.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from engine import TokenOutput
from service.contract import Timings, Usage

_NS_PER_MS = 1e6


@dataclass(slots=True)
class _ChoiceTimes:
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    num_tokens: int = 0
    num_cached_tokens: int = 0
    num_chunks: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_blocks: int = 0


class Measured:
    """What is known of one request. `arrived_ns`: when it came to be admitted; `num_prompt_tokens`: of its prompt."""

    def __init__(self, arrived_ns: int, num_prompt_tokens: int) -> None:
        self.arrived_ns = arrived_ns
        self.num_prompt_tokens = num_prompt_tokens
        self._choices: dict[int, _ChoiceTimes] = {}

    def take(self, output: TokenOutput, num_tokens: int, now_ns: int) -> None:
        """One engine output, of which `num_tokens` count; `now_ns` stands in where the engine gave no stamp."""
        times = self._choices.setdefault(output.choice, _ChoiceTimes())
        times.num_tokens += num_tokens
        facts = output.facts
        if num_tokens:
            times.last_token_ns = now_ns
        if facts is None:
            return
        if not times.first_scheduled_ns:
            times.first_scheduled_ns = facts.first_scheduled_ns
            times.num_cached_tokens = facts.num_cached_tokens
        if not times.first_token_ns:
            times.first_token_ns = facts.first_token_ns
        times.last_token_ns = facts.last_token_ns or times.last_token_ns
        times.num_chunks = max(times.num_chunks, facts.num_prefill_chunks)
        times.num_steps = max(times.num_steps, facts.num_steps)
        times.num_preemptions = max(times.num_preemptions, facts.num_preemptions)
        times.num_blocks = max(times.num_blocks, facts.num_blocks)

    @property
    def first_scheduled_ns(self) -> int:
        return _earliest(times.first_scheduled_ns for times in self._choices.values())

    @property
    def first_token_ns(self) -> int:
        return _earliest(times.first_token_ns for times in self._choices.values())

    @property
    def last_token_ns(self) -> int:
        return max((times.last_token_ns for times in self._choices.values()), default=0)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens of the choice that was scheduled first: the others share what that one computed."""
        scheduled = [times for times in self._choices.values() if times.first_scheduled_ns]
        first = min(scheduled, key=lambda times: times.first_scheduled_ns, default=None)
        return 0 if first is None else min(first.num_cached_tokens, self.num_prompt_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens of every choice that the engine said here: what an earlier attempt said is not among them."""
        return sum(times.num_tokens for times in self._choices.values())

    @property
    def num_chunks(self) -> int:
        return sum(times.num_chunks for times in self._choices.values())

    @property
    def num_steps(self) -> int:
        return max((times.num_steps for times in self._choices.values()), default=0)

    @property
    def num_preemptions(self) -> int:
        return sum(times.num_preemptions for times in self._choices.values())

    @property
    def num_blocks(self) -> int:
        return sum(times.num_blocks for times in self._choices.values())

    def usage(self, num_completion_tokens: int) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            cached_prompt_tokens=self.num_cached_tokens,
            completion_tokens=num_completion_tokens,
        )

    def timings(self, ended_ns: int) -> Timings:
        """Milliseconds from arrival. What never happened: queue lasts to the end, time to first token is 0."""
        first, last = self.first_token_ns, self.last_token_ns
        between = gaps = 0
        for times in self._choices.values():
            if times.num_tokens > 1 and times.first_token_ns:
                between += times.last_token_ns - times.first_token_ns
                gaps += times.num_tokens - 1
        return Timings(
            queue_ms=self._since_arrival_ms(self.first_scheduled_ns or ended_ns),
            ttft_ms=self._since_arrival_ms(first) if first else 0.0,
            tpot_ms=max(0.0, between / gaps / _NS_PER_MS) if gaps else 0.0,
            total_ms=self._since_arrival_ms(last or ended_ns),
        )

    def _since_arrival_ms(self, stamp_ns: int) -> float:
        return max(0.0, (stamp_ns - self.arrived_ns) / _NS_PER_MS)


def _earliest(stamps: Iterable[int]) -> int:
    return min((stamp for stamp in stamps if stamp), default=0)
