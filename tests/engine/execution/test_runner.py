"""The runner's flat batch, seen by a fake model and a fake backend."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention.base import AttentionMetadata
from engine.errors import OutOfMemoryError
from engine.execution.forward_batch import ForwardBatch
from engine.execution.runner import Runner
from engine.request import SamplingParams
from engine.scheduling.step import Chunk, ChunkResult, SequenceStart, StepPlan, StepResult
from kernels import ops

VOCAB, BLOCK = 32, 4
GREEDY = SamplingParams(max_tokens=50, seed=0, temperature=0.0)


@dataclass
class Seen:
    """One call of the model."""

    input_ids: list[int]
    positions: list[int]
    batch: ForwardBatch


class NextIdModel:
    """Its best next token is the last one plus one; keeps what it saw."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.error: Exception | None = None

    def forward(self, input_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        if self.error is not None:
            raise self.error
        self.seen.append(Seen(input_ids.tolist(), positions.tolist(), batch))
        rows = batch.logits_indices
        return input_ids.float().unsqueeze(1) if rows is None else input_ids[rows].float().unsqueeze(1)

    def compute_logits(self, hidden_rows: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((hidden_rows[:, 0].long() + 1) % VOCAB, VOCAB).float()

    def best_tokens(self, hidden_rows: Tensor) -> Tensor:
        return self.compute_logits(hidden_rows).argmax(dim=1)


class NoAttention:
    """A backend that adds nothing; `given`: the blocks that it heard of."""

    name = "none"

    def __init__(self) -> None:
        self.given: list[int] = []

    def allocate(self, *_: Any) -> tuple[()]:
        return ()

    def will_write(self, block_ids: Sequence[int]) -> None:
        self.given += block_ids

    def prepare(self, metadata: AttentionMetadata) -> AttentionMetadata:
        return replace(metadata, plan="prepared")

    def forward(self, *_: Any) -> Tensor:
        raise NotImplementedError


def _runner(overlap: bool = False) -> tuple[Runner, NextIdModel]:
    model = NextIdModel()
    runner = Runner(
        model=model,
        backend=NoAttention(),
        caches=(),
        device=torch.device("cpu"),
        num_slots=4,
        max_model_len=40,
        block_size=BLOCK,
        vocab_size=VOCAB,
        operators=ops.for_device("cpu", "torch"),
        overlap=overlap,
    )
    return runner, model


def _run(runner: Runner, plan: StepPlan) -> StepResult:
    return runner.collect(runner.launch(plan))


def _start(slot: int, tokens: tuple[int, ...]) -> SequenceStart:
    return SequenceStart(
        slot=slot, token_ids=tokens, num_prompt_tokens=len(tokens), choice=0, sampling=GREEDY, stop_token_ids=()
    )


def _chunk(slot: int, start: int, num_tokens: int, blocks: tuple[int, ...] = (), samples: bool = True) -> Chunk:
    return Chunk(slot=slot, start=start, num_tokens=num_tokens, new_block_ids=blocks, samples=samples)


def _plan(starts: tuple[SequenceStart, ...], *chunks: Chunk) -> StepPlan:
    return StepPlan(step=0, starts=starts, chunks=chunks)


def test_the_flat_batch_holds_each_chunk_in_plan_order() -> None:
    """Ids, positions, slots, lengths, tables and logits rows of a decode beside two prefill chunks."""
    runner, model = _runner()
    _run(runner, _plan((_start(2, (5, 6, 7, 8)),), _chunk(2, 0, 4, (9,))))
    starts = (_start(0, (1, 2, 3)), _start(3, (11, 12, 13, 14, 15, 16)))
    result = _run(runner, _plan(starts, _chunk(2, 4, 1, (6,)), _chunk(0, 0, 3, (1,)), _chunk(3, 0, 5, (7, 3), samples=False)))
    seen = model.seen[-1]
    metadata = seen.batch.attention
    assert seen.input_ids == [9, 1, 2, 3, 11, 12, 13, 14, 15]
    assert seen.positions == [4, 0, 1, 2, 0, 1, 2, 3, 4]
    assert metadata.slot_mapping.tolist() == [24, 4, 5, 6, 28, 29, 30, 31, 12]
    assert metadata.query_start_loc.tolist() == [0, 1, 4, 9]
    assert metadata.seq_lens.tolist() == [5, 3, 5]
    assert metadata.block_tables[0].tolist() == [9, 6]
    assert metadata.block_tables[1, 0] == 1
    assert metadata.block_tables[2].tolist() == [7, 3]
    assert (metadata.num_single_token_chunks, metadata.max_query_len, metadata.max_seq_len) == (1, 5, 5)
    assert (metadata.query_start_loc.dtype, metadata.slot_mapping.dtype) == (torch.int32, torch.int64)
    assert (metadata.plan, seen.batch.logits_indices is not None and seen.batch.logits_indices.tolist()) == ("prepared", [0, 3])
    assert isinstance(seen.batch.backend, NoAttention)
    assert seen.batch.backend.given == [9, 6, 1, 7, 3]
    assert result.chunks == (ChunkResult(token_ids=(10,)), ChunkResult(token_ids=(4,)), ChunkResult())


def test_a_said_token_is_the_next_steps_input() -> None:
    """The runner remembers it; no one sends it back."""
    runner, model = _runner()
    said = _run(runner, _plan((_start(1, (3,)),), _chunk(1, 0, 1, (0,)))).chunks[0].token_ids
    _run(runner, _plan((), _chunk(1, 1, 1)))
    assert model.seen[-1].input_ids == list(said) == [4]


def _follow(slot: int, start: int) -> Chunk:
    return Chunk(slot=slot, start=start, num_tokens=1, new_block_ids=(), samples=True, follows=True)


def test_a_step_that_follows_takes_what_was_drawn_before_the_host_knows_it() -> None:
    """Alone and beside a prefill, whose tokens the host does know."""
    runner, model = _runner(overlap=True)
    first = runner.launch(_plan((_start(1, (3,)), _start(2, (7,))), _chunk(1, 0, 1, (0,)), _chunk(2, 0, 1, (1,))))
    second = runner.launch(_plan((), _follow(2, 1), _follow(1, 1)))
    assert [chunk.token_ids for chunk in runner.collect(first).chunks] == [(4,), (8,)]
    third = runner.launch(_plan((_start(0, (20, 21)),), _follow(1, 2), _chunk(0, 0, 2, (2,))))
    assert [chunk.token_ids for chunk in runner.collect(second).chunks] == [(9,), (5,)]
    assert [chunk.token_ids for chunk in runner.collect(third).chunks] == [(6,), (22,)]
    assert [seen.input_ids for seen in model.seen] == [[3, 7], [8, 4], [5, 20, 21]]


def test_a_slot_given_away_before_its_step_is_collected_keeps_its_own_tokens() -> None:
    runner, model = _runner(overlap=True)
    runner.collect(runner.launch(_plan((_start(1, (3,)),), _chunk(1, 0, 1, (0,)))))
    late = runner.launch(_plan((), _follow(1, 1)))
    other = runner.launch(_plan((_start(1, (10, 11)),), _chunk(1, 0, 2, (1,))))
    runner.collect(late)
    runner.collect(other)
    _run(runner, _plan((), _chunk(1, 2, 1)))
    assert model.seen[-1].input_ids == [12]


def test_a_start_replaces_what_the_slot_held() -> None:
    """Tokens and block table, after a preemption or for another sequence."""
    runner, model = _runner()
    _run(runner, _plan((_start(1, (3, 4, 5, 6, 7)),), _chunk(1, 0, 5, (8, 2))))
    _run(runner, _plan((_start(1, (20, 21)),), _chunk(1, 0, 2, (5,))))
    assert model.seen[-1].input_ids == [20, 21]
    assert model.seen[-1].batch.attention.block_tables.tolist() == [[5]]


def test_a_plan_without_chunks_computes_nothing() -> None:
    """And a plan that samples nowhere asks for no logits."""
    runner, model = _runner()
    assert _run(runner, _plan(())).chunks == ()
    assert model.seen == []
    assert _run(runner, _plan((_start(0, (1, 2, 3)),), _chunk(0, 0, 2, (0,), samples=False))).chunks == (ChunkResult(),)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_lack_of_memory_has_one_type_and_the_step_can_be_sent_anew(error: Exception) -> None:
    """Device and host allocators alike; starts and blocks sent again give the step's own result."""
    runner, model = _runner()
    plan = _plan((_start(1, (3, 4, 5, 6, 7)),), _chunk(1, 0, 5, (8, 2)))
    model.error = error
    with pytest.raises(OutOfMemoryError):
        _run(runner, plan)
    model.error = None
    assert _run(runner, plan).chunks == (ChunkResult(token_ids=(8,)),)
    assert model.seen[-1].batch.attention.block_tables.tolist() == [[8, 2]]


def test_a_step_ahead_that_lacks_memory_leaves_the_one_under_way_as_it_is() -> None:
    """It is collected as if nothing had been tried, and what was tried is sent anew."""
    runner, model = _runner(overlap=True)
    first = runner.launch(_plan((_start(1, (3,)),), _chunk(1, 0, 1, (0,))))
    model.error = MemoryError()
    with pytest.raises(OutOfMemoryError):
        runner.launch(_plan((_start(2, (20,)),), _follow(1, 1), _chunk(2, 0, 1, (4,))))
    model.error = None
    assert runner.collect(first).chunks == (ChunkResult(token_ids=(4,)),)
    runner.release_memory()
    again = (_start(1, (3, 4)), _start(2, (20,)))
    result = _run(runner, _plan(again, _chunk(1, 1, 1, (0,)), _chunk(2, 0, 1, (4,))))
    assert [chunk.token_ids for chunk in result.chunks] == [(5,), (21,)]


def test_other_errors_pass_through() -> None:
    """Only lack of memory is translated."""
    runner, model = _runner()
    model.error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        _run(runner, _plan((_start(1, (3,)),), _chunk(1, 0, 1, (0,))))
