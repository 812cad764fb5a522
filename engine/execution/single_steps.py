"""Steps in which every sequence computes one token, without the Python of the model's layers: recorded once a number of sequences.

What a captured graph is to a GPU: the same operators on the same weights and caches with this step's tensors, so a step says bit for bit
what the model's own `forward` says. A step may run beside its caller, behind those begun before. Owner of the programs: at most one for
each number of slots and each thing wanted of a step.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from engine.attention.base import AttentionMetadata
from kernels.cpu.program import Program, Running

Record = Callable[[Callable[..., Tensor], list[Tensor]], tuple[Tensor, Program]]
Compute = Callable[..., Tensor]


class SingleSteps:
    """Runs functions of a step's input_ids and positions ([T] int64), its metadata and further tensors, [T] each."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._programs: dict[tuple[Compute, int], Program] = {}
        self._last: Running | None = None

    def run(self, compute: Compute, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, *more: Tensor) -> Tensor:
        """What `compute` gives. Every chunk of `metadata` holds one token, and no step that was begun may be under way."""
        inputs = _inputs(input_ids, positions, metadata, more)
        program = self._programs.get((compute, len(input_ids)))
        return self._recorded(compute, inputs, metadata) if program is None else program.run(inputs)

    def start(
        self, compute: Compute, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, *more: Tensor
    ) -> Running | None:
        """Begins what `run` does; what counts is what `compute` writes into `more` and into what it keeps. None: it is done, for its
        program had to be recorded."""
        inputs = _inputs(input_ids, positions, metadata, more)
        program = self._programs.get((compute, len(input_ids)))
        if program is None:
            self.settle()
            self._recorded(compute, inputs, metadata)
            return None
        self._last = program.start(inputs)
        return self._last

    def settle(self) -> None:
        """Waits for every step that was begun."""
        if self._last is not None:
            last, self._last = self._last, None
            last.synchronize()

    def _recorded(self, compute: Compute, inputs: list[Tensor], metadata: AttentionMetadata) -> Tensor:
        def whole(ids: Tensor, places: Tensor, starts: Tensor, lens: Tensor, tables: Tensor, slots: Tensor, *more: Any) -> Tensor:
            own = replace(metadata, query_start_loc=starts, seq_lens=lens, block_tables=tables, slot_mapping=slots)
            return compute(ids, places, own, *more)

        result, self._programs[compute, len(inputs[0])] = self._record(whole, inputs)
        return result


def _inputs(input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, more: tuple[Tensor, ...]) -> list[Tensor]:
    return [
        input_ids,
        positions,
        metadata.query_start_loc,
        metadata.seq_lens,
        metadata.block_tables,
        metadata.slot_mapping,
        *more,
    ]
