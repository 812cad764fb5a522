"""Steps in which every sequence computes one token, captured once a shape as a CUDA graph and replayed: one launch a step.

A step is padded to the next of a few numbers of sequences and lengths, so that some dozens of graphs cover all. What a step needs from
the host goes to the device in one copy. Graphs are captured when a step first asks for one (tens of milliseconds), never at start.
Owner of the graphs, of their inputs and of what they give: a step's logits stand until the next step of its shape is launched. Graphs share
the memory of what they compute on the way; each keeps its logits, 4 bytes x rows x vocabulary.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.base import AttentionMetadata
from engine.execution.host_batch import ON_DEVICE, HostBatch
from engine.execution.memory import lacks_memory

Logits = Callable[[Tensor, Tensor, AttentionMetadata, Tensor], Tensor]

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of sequences that are captured, and above them every multiple of the last. Up to some 200 rows a linear takes as long as
reading its weights does, so a padded row costs it next to nothing; norms, scratch and logits of padded rows do cost."""

SHORTEST, GROWTH = 512, 4
"""Contexts that are captured: `SHORTEST` (one split: no merge), then `GROWTH` times as long each. A length costs a wider block table
and longer work list, no arithmetic."""

MOST_TOKENS = 1 << 23
"""Sequences times length above which a step is not captured: its partial results would take more than a few hundred megabytes, and
so many tokens keep a device busy without a graph."""


def padded(num_seqs: int) -> int:
    """The number of sequences that a step of `num_seqs` is captured with."""
    return next((size for size in SIZES if size >= num_seqs), -(-num_seqs // SIZES[-1]) * SIZES[-1])


def bound(max_seq_len: int) -> int:
    """The context length that a step whose longest context is `max_seq_len` is captured with."""
    length = SHORTEST
    while length < max_seq_len:
        length *= GROWTH
    return length


def known_ids(input_ids: Tensor, slots: Tensor, drawn: Tensor) -> Tensor:
    """input_ids with what was `drawn` in their slots wherever they are `ON_DEVICE`, [T] int64."""
    return torch.where(input_ids == ON_DEVICE, drawn[slots], input_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where a step's inputs stand in one buffer: int64 first, so that everything is aligned."""

    num_seqs: int
    table_width: int

    @property
    def num_bytes(self) -> int:
        return self.num_seqs * (4 * 8 + 4) + self.num_seqs * self.table_width * 4

    def numpy(self, buffer: NDArray[np.uint8]) -> "_Arrays":
        n = self.num_seqs
        wide, narrow = buffer[: n * 32].view(np.int64).reshape(4, n), buffer[n * 32 :].view(np.int32)
        return _Arrays(wide[0], wide[1], wide[2], wide[3], narrow[:n], narrow[n:].reshape(n, self.table_width))

    def torch(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """input_ids, positions, slots, slot_mapping, seq_lens, block_tables as views."""
        n = self.num_seqs
        wide, narrow = buffer[: n * 32].view(torch.int64).view(4, n), buffer[n * 32 :].view(torch.int32)
        return (*wide, narrow[:n], narrow[n:].view(n, self.table_width))


@dataclass(frozen=True, slots=True)
class _Arrays:
    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    slot_mapping: NDArray[np.int64]
    seq_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]

    def fill(self, batch: HostBatch) -> None:
        """A sequence of no tokens, which writes nothing, stands for each that is missing."""
        n, blocks = len(batch.input_ids), batch.block_tables.shape[1]
        self.input_ids[:n], self.input_ids[n:] = batch.input_ids, 0
        self.positions[:n], self.positions[n:] = batch.positions, 0
        self.slots[:n], self.slots[n:] = batch.slots, 0
        self.slot_mapping[:n], self.slot_mapping[n:] = batch.slot_mapping, -1
        self.seq_lens[:n], self.seq_lens[n:] = batch.seq_lens, 0
        self.block_tables[:n, :blocks] = batch.block_tables


class _Inputs:
    """A buffer on the device that a graph reads, filled through pinned memory: by two in turns, so that hardly ever a step waits for
    the copy of one before."""

    def __init__(self, layout: _Layout, device: torch.device) -> None:
        self.layout = layout
        self.on_device = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
        self._pinned = [torch.zeros(layout.num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._arrays = [layout.numpy(pinned.numpy()) for pinned in self._pinned]
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._turn = 0

    def send(self, batch: HostBatch) -> None:
        self._turn ^= 1
        self._copied[self._turn].synchronize()
        self._arrays[self._turn].fill(batch)
        self.on_device.copy_(self._pinned[self._turn], non_blocking=True)
        self._copied[self._turn].record()


@dataclass(frozen=True, slots=True)
class _Program:
    """A graph with everything that it reads and writes, which must live as long as it does."""

    inputs: _Inputs
    metadata: AttentionMetadata
    rows: Tensor
    graph: torch.cuda.CUDAGraph
    logits: Tensor


class CapturedSteps:
    """`compute`: a step's logits [T, V] from input_ids and positions ([T] int64), its metadata and the rows wanted: every one.

    `drawn`: [num_slots] int64 on the device, what was drawn last in each slot.
    """

    def __init__(self, compute: Logits, drawn: Tensor, block_size: int) -> None:
        self._compute = compute
        self._drawn = drawn
        self._device = device = drawn.device
        self._block_size = block_size
        # None: there was no memory for it.
        self._programs: dict[tuple[int, int], _Program | None] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def logits(self, batch: HostBatch) -> Tensor | None:
        """[T, V] float32, in memory that is used again; None for a step that is not captured. Every chunk of `batch` holds one token.

        A shape that there was no memory to capture is not tried again before `clear`.
        """
        num_seqs = len(batch.input_ids)
        key = padded(num_seqs), bound(batch.max_seq_len)
        if key[0] * key[1] > MOST_TOKENS:
            return None
        if key not in self._programs:
            try:
                self._programs[key] = self._capture(*key, batch)
            except (MemoryError, RuntimeError) as error:
                if not lacks_memory(error):
                    raise
                self._programs[key] = None
        program = self._programs[key]
        if program is None:
            return None
        program.inputs.send(batch)
        program.graph.replay()
        return program.logits[:num_seqs]

    def clear(self) -> None:
        """Drops all graphs and their memory; no step may be under way."""
        self._programs.clear()

    def _capture(self, num_seqs: int, max_seq_len: int, batch: HostBatch) -> _Program:
        inputs = _Inputs(_Layout(num_seqs=num_seqs, table_width=-(-max_seq_len // self._block_size)), self._device)
        inputs.send(batch)
        input_ids, positions, slots, slot_mapping, seq_lens, block_tables = inputs.layout.torch(inputs.on_device)
        every = torch.arange(num_seqs + 1, dtype=torch.int64, device=self._device)
        rows = every[:-1]
        metadata = AttentionMetadata(
            query_start_loc=every.to(torch.int32),
            seq_lens=seq_lens,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
            num_single_token_chunks=num_seqs,
            max_query_len=1,
            max_seq_len=max_seq_len,
        )
        graph, main = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        try:
            with torch.cuda.stream(self._stream):
                # Kernels are compiled and libraries take their workspaces here, which a capture does not allow.
                self._compute(known_ids(input_ids, slots, self._drawn), positions, metadata, rows)
                self._stream.synchronize()
                graph.capture_begin(pool=self._pool)
                try:
                    logits = self._compute(known_ids(input_ids, slots, self._drawn), positions, metadata, rows)
                except BaseException:
                    # What went wrong inside is the news, not that the capture broke off.
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:
            # What a warm-up that failed has launched must not run beside what comes next.
            main.wait_stream(self._stream)
        return _Program(inputs, metadata, rows, graph, logits)
