"""Steps in which every sequence computes one token, without the Python of the model's layers: recorded once a number of sequences.

What a captured graph is to a GPU: the same operators on the same weights and caches with this step's tensors, so a step says bit for bit
what the model's own `forward` says. Owner of the programs: at most one for each number of slots and each thing wanted of a step.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from engine.attention.base import AttentionMetadata

Record = Callable[[Callable[..., Tensor], list[Tensor]], tuple[Tensor, Callable[[list[Tensor]], Tensor]]]
Compute = Callable[[Tensor, Tensor, AttentionMetadata, Tensor], Tensor]


class SingleSteps:
    """Runs functions of a step's input_ids and positions ([T] int64), its metadata and the rows wanted: every one."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._programs: dict[tuple[Compute, int], Callable[[list[Tensor]], Tensor]] = {}

    def run(self, compute: Compute, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, rows: Tensor) -> Tensor:
        """What `compute` gives. Every chunk of `metadata` holds one token, and `rows` are all of them."""
        inputs = [
            input_ids,
            positions,
            metadata.query_start_loc,
            metadata.seq_lens,
            metadata.block_tables,
            metadata.slot_mapping,
        ]
        program = self._programs.get((compute, len(input_ids)))
        if program is not None:
            return program(inputs)

        def whole(ids: Tensor, places: Tensor, starts: Tensor, lens: Tensor, tables: Tensor, slots: Tensor) -> Tensor:
            own = replace(metadata, query_start_loc=starts, seq_lens=lens, block_tables=tables, slot_mapping=slots)
            return compute(ids, places, own, rows)

        result, self._programs[compute, len(input_ids)] = self._record(whole, inputs)
        return result
