"""A deterministic paged "model": the next token is a function of every token so far, read back from the blocks.

Each KV slot holds a running number over all tokens up to its position. A chunk reads the slot before it, writes its own, and the
sampled row re-reads every slot of the context: a block that is shared wrongly, computed late or freed early gives another number.
"""

from dataclasses import dataclass, field

from engine.request import Request, SamplingParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.step import Chunk, ChunkResult, SequenceStart, StepPlan

VOCABULARY = 31
EOS = (0, 1)
_MODULUS = 2**61 - 1


def fold(number: int, token_id: int) -> int:
    """The number of a prefix that is one token longer."""
    return (number * 1_000_003 + token_id + 7) % _MODULUS


def next_token(number: int, sampling: SamplingParams, choice: int, num_said: int, stops: tuple[int, ...]) -> int:
    """What the model says after a prefix; stop tokens are masked until `min_tokens` are said."""
    draw = (number ^ (sampling.seed * 2_654_435_761) ^ (choice * 40_503)) % _MODULUS
    if num_said < sampling.min_tokens:
        allowed = [token for token in range(VOCABULARY) if token not in stops]
        return allowed[draw % len(allowed)]
    return draw % VOCABULARY


def poisoned_at(sampling: SamplingParams) -> int:
    """The output position whose logits are not finite; -1: none. A function of the seed, so that any batch sees the same."""
    return sampling.seed // 11 % 6 if sampling.seed % 11 == 3 else -1


def stops_of(sampling: SamplingParams) -> tuple[int, ...]:
    """What ends a choice, as the scheduler should hand it to the runner."""
    return tuple(dict.fromkeys((*sampling.stop_token_ids, *(() if sampling.ignore_eos else EOS))))


def expected(request: Request, choice: int) -> tuple[list[int], str]:
    """The trivial reference, one sequence alone: all tokens of the output, and the finish reason."""
    sampling, stops = request.sampling, stops_of(request.sampling)
    said = list(request.output_token_ids[choice]) if request.output_token_ids else []
    number = 0
    for token in (*request.prompt_token_ids, *said):
        number = fold(number, token)
    if said and said[-1] in stops and len(said) > sampling.min_tokens:
        return said, "stop"
    while len(said) < sampling.max_tokens:
        if len(said) == poisoned_at(sampling):
            return said, "error"
        token = next_token(number, sampling, choice, len(said), stops)
        said.append(token)
        number = fold(number, token)
        if token in stops and len(said) > sampling.min_tokens:
            return said, "stop"
    return said, "length"


@dataclass
class _Slot:
    start: SequenceStart
    token_ids: list[int]
    table: list[int] = field(default_factory=list)


class ToyModel:
    """Runs plans. `pool` is only asked whether a block that is written belongs to the writer alone."""

    def __init__(self, num_blocks: int, block_size: int, pool: BlockPool) -> None:
        self._block_size = block_size
        self._cells = [-1] * (num_blocks * block_size)
        self._pool = pool
        self._slots: dict[int, _Slot] = {}

    def run(self, plan: StepPlan, num_tokens: list[int]) -> list[ChunkResult]:
        """One result a chunk; `num_tokens[i % len]`: how many tokens the i-th chunk should say (0, 1, more)."""
        for start in plan.starts:
            self._slots[start.slot] = _Slot(start, list(start.token_ids))
        return [self._run_chunk(chunk, num_tokens[i % len(num_tokens)]) for i, chunk in enumerate(plan.chunks)]

    def _cell(self, slot: _Slot, position: int) -> int:
        return slot.table[position // self._block_size] * self._block_size + position % self._block_size

    def _run_chunk(self, chunk: Chunk, num_says: int) -> ChunkResult:
        slot = self._slots[chunk.slot]
        slot.table.extend(chunk.new_block_ids)
        end = chunk.start + chunk.num_tokens
        number = self._cells[self._cell(slot, chunk.start - 1)] if chunk.start else 0
        for position in range(chunk.start, end):
            block = slot.table[position // self._block_size]
            assert self._pool.ref_count(block) == 1, (
                f"block {block} is written while {self._pool.ref_count(block)} tables hold it"
            )
            assert self._pool.hash_of(block) is None, f"block {block} is written after it was published"
            number = fold(number, slot.token_ids[position])
            self._cells[self._cell(slot, position)] = number
        if not chunk.samples:
            return ChunkResult()
        assert end == len(slot.token_ids), "a chunk samples before the last known token"
        self._reread(slot, end)
        return self._say(slot, number, num_says)

    def _reread(self, slot: _Slot, end: int) -> None:
        number = 0
        for position in range(end):
            number = fold(number, slot.token_ids[position])
            assert self._cells[self._cell(slot, position)] == number, f"position {position} holds another sequence's number"

    def _say(self, slot: _Slot, number: int, num_says: int) -> ChunkResult:
        start, said = slot.start, []
        for _ in range(num_says):
            num_said = len(slot.token_ids) - start.num_prompt_tokens
            if num_said == poisoned_at(start.sampling):
                if not said:
                    # A step that follows before anybody knows has to be computed from some token.
                    slot.token_ids.append(0)
                    return ChunkResult(finite=False)
                break
            token = next_token(number, start.sampling, start.choice, num_said, start.stop_token_ids)
            said.append(token)
            slot.token_ids.append(token)
            number = fold(number, token)
        return ChunkResult(token_ids=tuple(said))
