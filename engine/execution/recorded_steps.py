"""Steps without the Python of the model's layers, recorded once for each thing that can be wanted of a step.

What a captured graph is to a GPU: the same operators on the same weights and caches with this step's tensors, so a step says bit for bit
what the model's own `forward` says. A step of single tokens may run beside its caller, behind those begun before. Owner of the programs:
of each thing wanted of a step one for any chunks, and a copy of it for each number of single tokens that has come by.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.attention.base import AttentionMetadata
from engine.scheduling.step import Chunk
from kernels.cpu.program import Program, Running

Record = Callable[[Callable[..., Tensor], list[Tensor]], tuple[Tensor, Program]]
Compute = Callable[..., Tensor]

FEW = 3
"""Tokens that a step is recorded with. Of one, unlike these, what lies apart and what lies together are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleTokens:
    """The flat batch of n single tokens: input_ids (`ON_DEVICE` where one is not known yet) and positions, [n] int64, and what
    `AttentionMetadata` says of the rest."""

    input_ids: Tensor
    positions: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor


class RecordedSteps:
    """Runs functions of input_ids, positions, metadata and further tensors, once they are recorded.

    `record`: `kernels.cpu.program.record`; `single_tokens`: the operator of that name, bound to the slots' tokens and blocks.
    """

    def __init__(self, record: Record, single_tokens: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self._record = record
        self._single_tokens = single_tokens
        self._programs: dict[Compute, Program] = {}
        self._of_singles: dict[tuple[Compute, int], Program] = {}  # by their number
        self._last: Running | None = None

    def record(self, compute: Compute, *more: Tensor) -> None:
        """Records what `compute` does of any number of tokens, by doing it for `FEW` that write nothing into the cache.

        `more`: its further tensors for so many, which it may write into. Raises what `compute` and the recorder raise.
        """

        def whole(
            ids: Tensor, places: Tensor, starts: Tensor, lens: Tensor, tables: Tensor, mapping: Tensor, *more: Tensor
        ) -> Tensor:
            metadata = AttentionMetadata(
                query_start_loc=starts,
                seq_lens=lens,
                block_tables=tables,
                slot_mapping=mapping,
                # What is recorded reads the tensors alone.
                num_single_token_chunks=0,
                max_query_len=0,
                max_seq_len=0,
            )
            return compute(ids, places, metadata, *more)

        # First tokens of sequences: in any model's context, in any size of block. A tensor for each: that is what a recorder tells apart.
        ids, places, mapping = (torch.full((FEW,), number) for number in (0, 0, -1))
        starts, lens = torch.arange(FEW + 1, dtype=torch.int32), torch.ones(FEW, dtype=torch.int32)
        tables = torch.zeros(FEW, 1, dtype=torch.int32)
        _, self._programs[compute] = self._record(whole, [ids, places, starts, lens, tables, mapping, *more])

    def batch(self, chunks: tuple[Chunk, ...]) -> tuple[SingleTokens, Tensor]:
        """The chunks' batch and their slots, [n] int64."""
        columns = np.array([(chunk.slot, chunk.start, chunk.follows) for chunk in chunks], np.int64)
        ids, positions, slots, starts, lens, tables, mapping = self._single_tokens(torch.from_numpy(columns))
        made = SingleTokens(
            input_ids=ids, positions=positions, query_start_loc=starts, seq_lens=lens, block_tables=tables, slot_mapping=mapping
        )
        return made, slots

    def run(self, compute: Compute, batch: SingleTokens, *more: Tensor) -> Tensor:
        """What `compute` gives; no step that was begun may be under way."""
        return self._program(compute, batch).run(_inputs(batch, more))

    def run_chunks(
        self, compute: Compute, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, rows: Tensor
    ) -> Tensor:
        """What `compute` gives of chunks of any length; no step that was begun may be under way."""
        starts, lens = metadata.query_start_loc, metadata.seq_lens
        inputs = [input_ids, positions, starts, lens, metadata.block_tables, metadata.slot_mapping, rows]
        return self._programs[compute].run(inputs)

    def start(self, compute: Compute, batch: SingleTokens, *more: Tensor) -> Running:
        """Begins what `run` does; what counts is what `compute` writes into `more` and into what it keeps."""
        self._last = self._program(compute, batch).start(_inputs(batch, more))
        return self._last

    def settle(self) -> None:
        """Waits for every step that was begun; what went wrong in one is told to whoever synchronizes with it."""
        if self._last is not None:
            last, self._last = self._last, None
            last.wait()

    def _program(self, compute: Compute, batch: SingleTokens) -> Program:
        kind = compute, len(batch.input_ids)
        program = self._of_singles.get(kind)
        if program is None:
            program = self._of_singles[kind] = self._programs[compute].copy()
        return program


def _inputs(batch: SingleTokens, more: tuple[Tensor, ...]) -> list[Tensor]:
    return [
        batch.input_ids,
        batch.positions,
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_tables,
        batch.slot_mapping,
        *more,
    ]
