"""Steps captured once a shape as a CUDA graph and replayed: one launch a step, where Python's launches would take longer than the device.

A step is padded to the next of a few numbers of decodes, chunks and tokens, and to the next of a few lengths, so that some dozens of graphs
cover most. What a step needs from the host goes to the device in one copy. Graphs are captured when a step asks for one (tens of
milliseconds), never at start. Owner of the graphs, of their inputs and of what they give: it stands until the next step of its shape is
launched. Graphs share the memory of what they compute on the way; each keeps what it gives.
"""

import math
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.base import AttentionMetadata
from engine.execution.host_batch import ON_DEVICE, HostBatch
from engine.execution.memory import lacks_memory

Compute = Callable[[Tensor, Tensor, AttentionMetadata, Tensor], Tensor]

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of decodes that are captured, and above them every multiple of the last. Up to some 200 rows a linear takes as long as
reading its weights does, so a padded row costs it next to nothing; norms, scratch and logits of padded rows do cost."""

SHORTEST, GROWTH = 512, 4
"""Contexts that are captured: `SHORTEST` (one split: no merge), then `GROWTH` times as long each. A length costs a wider block table
and longer work list, no arithmetic."""

MOST_TOKENS = 1 << 23
"""Decodes times length above which a step is not captured: its partial results would take more than a few hundred megabytes, and
so many tokens keep a device busy without a graph."""

TOKENS = 64
"""Tokens of a step with prefill are padded to a multiple of this: about what a large product's tiles round them up to anyway."""

SLOWER_THAN_NEXT = {448: 512}
"""Multiples that are padded further. The library chooses badly for 448 rows: its product with Llama-3-8B's `gate_up` takes 273 us on an
H200, that of 512 rows 186 (torch 2.11)."""

MOST_MIXED = 1024
"""Tokens above which a step with prefill is not captured: the device computes for longer than Python launches."""

CHUNKS, CHUNKS_GROWTH = 2, 8
"""Numbers of prefill chunks that are captured: `CHUNKS`, then `CHUNKS_GROWTH` times as many each. One too many costs a row of a table."""

MOST_SHAPES = 128
"""Shapes with prefill that are captured; steps of further ones are launched by Python. One shape's second step captures it: most of the
many that a start sees once never come again."""


def padded(num_decodes: int) -> int:
    """The number of decodes that a step of `num_decodes` is captured with."""
    if num_decodes == 0:
        return 0
    return next((size for size in SIZES if size >= num_decodes), -(-num_decodes // SIZES[-1]) * SIZES[-1])


def bound(max_seq_len: int) -> int:
    """The context length that a step whose longest context is `max_seq_len` is captured with."""
    return _grown(SHORTEST, GROWTH, max_seq_len)


def _grown(least: int, growth: int, needed: int) -> int:
    while least < needed:
        least *= growth
    return least


def known_ids(input_ids: Tensor, slots: Tensor, drawn: Tensor) -> Tensor:
    """input_ids with what was `drawn` in their slots wherever they are `ON_DEVICE`, [T] int64."""
    return torch.where(input_ids == ON_DEVICE, drawn.index_select(0, slots), input_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a step is captured with: decodes, chunks and tokens with the padding, and a bound of the contexts' length."""

    num_decodes: int
    num_chunks: int
    num_tokens: int
    max_seq_len: int

    @property
    def num_seqs(self) -> int:
        return self.num_decodes + self.num_chunks


def shape_of(batch: HostBatch) -> Shape | None:
    """The shape that a step is padded to; None for one that is not captured."""
    decodes = batch.num_single_token_chunks
    chunks, tokens = len(batch.seq_lens) - decodes, len(batch.input_ids) - decodes
    shape = Shape(
        num_decodes=padded(decodes),
        num_chunks=_grown(CHUNKS, CHUNKS_GROWTH, chunks) if chunks else 0,
        num_tokens=padded(decodes) + tokens,
        max_seq_len=bound(batch.max_seq_len),
    )
    if chunks:
        tokens = -(-shape.num_tokens // TOKENS) * TOKENS
        shape = replace(shape, num_tokens=SLOWER_THAN_NEXT.get(tokens, tokens))
    whole = shape.num_decodes * shape.max_seq_len <= MOST_TOKENS and (not chunks or shape.num_tokens <= MOST_MIXED)
    return shape if whole else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where a step's inputs stand in one buffer: input_ids, positions, slots, slot_mapping, rows, query_start_loc, seq_lens and
    block_tables, each at a multiple of 16 bytes, as kernels are compiled for."""

    shape: Shape
    table_width: int

    @property
    def num_bytes(self) -> int:
        return self._places()[-1][0].stop

    def numpy(self, buffer: NDArray[np.uint8]) -> "_Arrays":
        return _Arrays(self.shape, *(buffer[place].view(f"i{size}").reshape(shape) for place, size, shape in self._places()))

    def torch(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """The inputs as views, in order."""
        types = {8: torch.int64, 4: torch.int32}
        return tuple(buffer[place].view(types[size]).view(shape) for place, size, shape in self._places())

    def _places(self) -> list[tuple[slice, int, tuple[int, ...]]]:
        """(bytes in the buffer, bytes of an element, shape) of each."""
        tokens, seqs = (self.shape.num_tokens,), self.shape.num_seqs
        parts = [(8, tokens)] * 4 + [(8, (seqs,)), (4, (seqs + 1,)), (4, (seqs,)), (4, (seqs, self.table_width))]
        places, begin = [], 0
        for size, shape in parts:
            places.append((slice(begin, begin + size * math.prod(shape)), size, shape))
            begin = -(-places[-1][0].stop // 16) * 16
        return places


@dataclass(frozen=True, slots=True)
class _Arrays:
    shape: Shape
    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    slot_mapping: NDArray[np.int64]
    rows: NDArray[np.int64]
    query_start_loc: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]

    def fill(self, batch: HostBatch) -> None:
        """Decodes first, then chunks, each with its padding behind it: sequences of no tokens, and tokens that nobody's are and that
        write nothing."""
        decodes, num_rows = batch.num_single_token_chunks, len(batch.rows)
        ahead = self.shape.num_decodes - decodes
        for own, given, nothing in (
            (self.input_ids, batch.input_ids, 0),
            (self.positions, batch.positions, 0),
            (self.slots, batch.slots, 0),
            (self.slot_mapping, batch.slot_mapping, -1),
            (self.seq_lens, batch.seq_lens, 0),
        ):
            own[:decodes], own[decodes : decodes + ahead] = given[:decodes], nothing
            own[decodes + ahead : len(given) + ahead], own[len(given) + ahead :] = given[decodes:], nothing
        blocks = batch.block_tables.shape[1]
        self.block_tables[:decodes, :blocks] = batch.block_tables[:decodes]
        self.block_tables[decodes + ahead : len(batch.block_tables) + ahead, :blocks] = batch.block_tables[decodes:]
        starts = self.query_start_loc
        starts[: self.shape.num_decodes] = np.arange(self.shape.num_decodes)
        starts[self.shape.num_decodes :] = batch.query_start_loc[-1] + ahead
        starts[self.shape.num_decodes : len(batch.seq_lens) + ahead] = batch.query_start_loc[decodes:-1] + ahead
        self.rows[:num_rows], self.rows[num_rows:] = np.where(batch.rows < decodes, batch.rows, batch.rows + ahead), 0


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


def padded_step(layout: _Layout, buffer: Tensor, drawn: Tensor, compute: Compute) -> Tensor:
    """`compute` of the step that a filled `buffer` holds; reads nothing but tensors."""
    input_ids, positions, slots, slot_mapping, rows, query_start_loc, seq_lens, block_tables = layout.torch(buffer)
    metadata = AttentionMetadata(
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_tables=block_tables,
        slot_mapping=slot_mapping,
        num_single_token_chunks=layout.shape.num_decodes,
        max_query_len=max(1, layout.shape.num_tokens - layout.shape.num_decodes),
        max_seq_len=layout.shape.max_seq_len,
    )
    return compute(known_ids(input_ids, slots, drawn), positions, metadata, rows)


@dataclass(frozen=True, slots=True)
class _Program:
    """A graph with everything that it reads and writes, which must live as long as it does."""

    inputs: _Inputs
    graph: torch.cuda.CUDAGraph
    result: Tensor

    def run(self, batch: HostBatch) -> Tensor:
        """What it gives for the rows that `batch` wants."""
        self.inputs.send(batch)
        self.graph.replay()
        return self.result[: len(batch.rows)]


class CapturedSteps:
    """Two computations of input_ids and positions ([T] int64), a step's metadata and the rows wanted ([N] int64): `logits` ([N, V]
    float32) for steps of single tokens that all sample, `hidden` ([N, H]) for the others, whose many shapes would keep too many logits.

    `drawn`: [num_slots] int64 on the device, what was drawn last in each slot.
    """

    def __init__(self, *, logits: Compute, hidden: Compute, drawn: Tensor, block_size: int) -> None:
        self._logits = logits
        self._hidden = hidden
        self._drawn = drawn
        self._device = device = drawn.device
        self._block_size = block_size
        # None: there was no memory for it.
        self._single: dict[Shape, _Program | None] = {}
        self._mixed: dict[Shape, _Program | None] = {}
        self._met: Counter[Shape] = Counter()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def logits(self, batch: HostBatch) -> Tensor | None:
        """[T, V] float32 of a step of single tokens that all sample, in memory that is used again; None for a step that is not captured.

        A shape that there was no memory to capture is not tried again before `clear`.
        """
        shape = shape_of(batch)
        return None if shape is None else self._run(self._single, shape, self._logits, batch)

    def hidden(self, batch: HostBatch) -> Tensor | None:
        """[N, H] of the rows that any other step wants; otherwise as `logits`."""
        shape = shape_of(batch)
        if shape is None:
            return None
        if shape not in self._mixed:
            self._met[shape] += 1
            if self._met[shape] == 1 or len(self._mixed) >= MOST_SHAPES:
                return None
        return self._run(self._mixed, shape, self._hidden, batch)

    def clear(self) -> None:
        """Drops all graphs and their memory; no step may be under way."""
        self._single.clear()
        self._mixed.clear()
        self._met.clear()
        # A pool that no graph uses any more is gone.
        self._pool = torch.cuda.graph_pool_handle()

    def _run(self, programs: dict[Shape, _Program | None], shape: Shape, compute: Compute, batch: HostBatch) -> Tensor | None:
        if shape not in programs:
            try:
                programs[shape] = self._capture(shape, compute, batch)
            except (MemoryError, RuntimeError) as error:
                if not lacks_memory(error):
                    raise
                programs[shape] = None
        program = programs[shape]
        return None if program is None else program.run(batch)

    def _capture(self, shape: Shape, compute: Compute, batch: HostBatch) -> _Program:
        inputs = _Inputs(_Layout(shape=shape, table_width=-(-shape.max_seq_len // self._block_size)), self._device)
        inputs.send(batch)
        step = partial(padded_step, inputs.layout, inputs.on_device, self._drawn)
        graph, main = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        try:
            with torch.cuda.stream(self._stream):
                # Kernels are compiled and libraries take their workspaces here, which a capture does not allow.
                step(compute)
                self._stream.synchronize()
                graph.capture_begin(pool=self._pool)
                try:
                    result = step(compute)
                except BaseException:
                    # What went wrong inside is the news, not that the capture broke off.
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:
            # What a warm-up that failed has launched must not run beside what comes next.
            main.wait_stream(self._stream)
        return _Program(inputs, graph, result)
