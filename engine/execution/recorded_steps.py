"""Steps without the Python of the model's layers: those in which every sequence computes one token and samples, recorded once a number
of sequences, and all others, recorded once.

What a captured graph is to a GPU: the same operators on the same weights and caches with this step's tensors, so a step says bit for bit
what the model's own `forward` says. A step of single tokens may run beside its caller, behind those begun before. Owner of the programs:
of each thing wanted of a step at most one for each number of slots, and one for any chunks.
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
    """Runs functions of input_ids, positions, metadata and further tensors.

    `record`: `kernels.cpu.program.record`; `single_tokens`: the operator of that name, bound to the slots' tokens and blocks.
    """

    def __init__(self, record: Record, single_tokens: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self._record = record
        self._single_tokens = single_tokens
        self._programs: dict[tuple[Compute, int], Program] = {}  # of single tokens, by their number; 0: of any chunks
        self._last: Running | None = None

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
        inputs, num_seqs = _inputs(batch, more), len(batch.input_ids)
        program = self._programs.get((compute, num_seqs))
        return self._recorded(compute, num_seqs, inputs) if program is None else program.run(inputs)

    def run_chunks(
        self, compute: Compute, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, rows: Tensor
    ) -> Tensor:
        """What `compute` gives of chunks of any length; no step that was begun may be under way."""
        if (compute, 0) not in self._programs:
            self._recorded(compute, 0, _few_tokens())
        starts, lens = metadata.query_start_loc, metadata.seq_lens
        inputs = [input_ids, positions, starts, lens, metadata.block_tables, metadata.slot_mapping, rows]
        return self._programs[compute, 0].run(inputs)

    def start(self, compute: Compute, batch: SingleTokens, *more: Tensor) -> Running | None:
        """Begins what `run` does; what counts is what `compute` writes into `more` and into what it keeps. None: it is done, for its
        program had to be recorded."""
        inputs = _inputs(batch, more)
        program = self._programs.get((compute, len(batch.input_ids)))
        if program is None:
            self.settle()
            self._recorded(compute, len(batch.input_ids), inputs)
            return None
        self._last = program.start(inputs)
        return self._last

    def settle(self) -> None:
        """Waits for every step that was begun; what went wrong in one is told to whoever synchronizes with it."""
        if self._last is not None:
            last, self._last = self._last, None
            last.wait()

    def _recorded(self, compute: Compute, num_singles: int, inputs: list[Tensor]) -> Tensor:
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

        result, self._programs[compute, num_singles] = self._record(whole, inputs)
        return result


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


def _few_tokens() -> list[Tensor]:
    """Inputs to record a step of chunks with: one that writes nothing into the cache. Whatever is recorded is kept until it is over, in
    all layers; and of one token or row, unlike these, what lies apart and what lies together are the same."""
    ids, rows = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 2])
    starts, lens, tables = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([0, 3], [3], [[0]]))
    return [ids, torch.arange(3), starts, lens, tables, torch.full((3,), -1), rows]
