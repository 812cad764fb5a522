"""Runs a plan: makes the flat batch, calls the model, samples. Owner of slots' tokens, block tables and sampling state.

`launch` does not wait for the device (but to capture a graph, once a shape), `collect` is where the host does, in the order of
launches. Between the two the step after may be launched: what a step draws stays on the device for it. On a CPU that is so of steps of
greedy tokens alone, which run on threads of their own; others are done when they are launched. A captured graph may stand in for the
model call. A plan that ran out of memory may be retracted: later plans then send its sequences anew. Knows nothing of
requests, queues or block ownership.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.base import AttentionBackend, AttentionMetadata, LayerCache
from engine.execution.captured_steps import CapturedSteps, known_ids
from engine.execution.forward_batch import ForwardBatch
from engine.execution.host_batch import ON_DEVICE, HostBatch
from engine.execution.memory import memory_errors
from engine.execution.recorded_steps import FEW, RecordedSteps
from engine.execution.sampler import PendingSample, Sampler
from engine.execution.slot_table import Ints, SlotTable
from engine.models.registry import Model
from engine.scheduling.step import Chunk, ChunkResult, Follow, StepPlan, StepResult
from kernels.ops import Operators
from kernels.transfer import to_device

_NO_MEMORY = "there was no memory for a step"
_NOTHING = ChunkResult()
_NO_SLOTS = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A step on its way: its chunks, the slots of those that sample with the count of their starts, and what will be drawn.

    `pending` is None when no chunk samples.
    """

    chunks: tuple[Chunk, ...]
    slots: Ints
    starts: Ints
    pending: PendingSample | None


def _nothing(chunks: tuple[Chunk, ...]) -> Launched:
    return Launched(chunks=chunks, slots=_NO_SLOTS, starts=_NO_SLOTS, pending=None)


class Runner:
    """Fixed request slots over one model, one attention backend and its caches.

    `overlap`: whether the step after is to be launched before one is collected, where it may be.
    """

    def __init__(
        self,
        *,
        model: Model,
        backend: AttentionBackend,
        caches: tuple[LayerCache, ...],
        device: torch.device,
        num_slots: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        operators: Operators,
        overlap: bool = False,
    ) -> None:
        self._model = model
        self._backend = backend
        self._caches = caches
        self._device = device
        self._block_size = block_size
        self._slots = SlotTable(num_slots=num_slots, max_tokens=max_model_len, block_size=block_size)
        self._sampler = Sampler(num_slots=num_slots, vocab_size=vocab_size, device=device, operators=operators)
        self._recorded_steps: RecordedSteps | None = None
        single_tokens = operators.single_tokens
        if operators.record is not None and single_tokens is not None and backend.recordable == "any step":
            tokens, blocks = torch.from_numpy(self._slots.tokens), torch.from_numpy(self._slots.blocks)
            self._recorded_steps = RecordedSteps(
                operators.record, lambda chunks: single_tokens(tokens, blocks, chunks, block_size)
            )
        self._finds_best = operators.greedy_linear is not None
        self.overlaps = overlap
        # What was drawn last in each slot, for the step that follows before the host knows.
        self._drawn = torch.zeros(num_slots, dtype=torch.int64, device=device)
        captures = device.type == "cuda" and backend.recordable != "nothing"
        self._captured = (
            CapturedSteps(logits=self._logits, hidden=self._hidden, drawn=self._drawn, block_size=block_size)
            if captures
            else None
        )
        if self._recorded_steps is not None:
            self._record(self._recorded_steps)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Starts the plan on the device. Raises `OutOfMemoryError`."""
        chunks = plan.chunks
        with memory_errors(_NO_MEMORY):
            for start in plan.starts:
                self._slots.start(start)
                self._sampler.start(start)
            for chunk in chunks:
                if chunk.new_block_ids:
                    self._slots.grow(chunk)
                    self._backend.will_write(chunk.new_block_ids)
            if not chunks:
                return _nothing(chunks)
            if self._recorded_steps is not None and all(chunk.samples and chunk.num_tokens == 1 for chunk in chunks):
                return self._launch_singles(self._recorded_steps, chunks)
            self._settle()
            columns = np.array(
                [(chunk.slot, chunk.start, chunk.num_tokens, chunk.samples, chunk.follows) for chunk in chunks], np.int64
            )
            slots, starts, lengths, samples, follows = columns.T
            sampling = samples.nonzero()[0]
            batch = self._batch(slots, starts, lengths, sampling, follows)
            slots = slots[sampling]
            # Then the model gives tokens in place of logits.
            best = self._finds_best and self._sampler.all_plain(slots)
            if sampling.size == len(batch.input_ids):
                found = self._every(batch, best)
            else:
                hidden = self._some(batch)
                if not sampling.size:
                    return _nothing(chunks)
                found = self._model.best_tokens(hidden) if best else self._model.compute_logits(hidden)
            if best:
                pending = self._sampler.take(found)
            else:
                said = (starts + lengths)[sampling] - self._slots.num_prompt[slots]
                pending = self._sampler.launch(found, slots, said)
            self._remember(self._sent(slots), pending)
            return self._launched(chunks, slots, pending)

    def may_follow(self, launched: Launched) -> Follow:
        """What may be launched behind a step before it is collected."""
        if not self.overlaps:
            return "nothing"
        if self._device.type == "cuda":
            return "anything"
        beside = launched.pending is not None and launched.pending.arrived is not None
        return "single tokens" if beside else "nothing"

    def collect(self, launched: Launched) -> StepResult:
        """Waits for the step; remembers its tokens. Raises `OutOfMemoryError` for a step beside the caller that lacked memory."""
        if launched.pending is None:
            return StepResult(chunks=(_NOTHING,) * len(launched.chunks))
        with memory_errors(_NO_MEMORY):
            drawn = self._sampler.collect(launched.pending)
        # A slot that was given away since has tokens of its own.
        same = launched.starts == self._slots.starts[launched.slots]
        tokens = launched.pending.on_host.tokens.numpy()
        self._slots.append(launched.slots[same], tokens[same])
        if len(drawn) < len(launched.chunks):
            each = iter(drawn)
            drawn = [next(each) if chunk.samples else _NOTHING for chunk in launched.chunks]
        return StepResult(chunks=tuple(drawn))

    def release_memory(self) -> None:
        """Gives cached, unused device memory back; after an `OutOfMemoryError`, with no step to be collected any more."""
        self._settle()
        if self._device.type != "cuda":
            return
        # What a launch that failed had begun may still run.
        torch.cuda.synchronize(self._device)
        if self._captured is not None:
            self._captured.clear()
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def _record(self, steps: RecordedSteps) -> None:
        """All that a step may be wanted for, before there is one: in the midst of a stream it would be heard as a pause."""
        slots = torch.zeros(FEW, dtype=torch.int64)
        with memory_errors(_NO_MEMORY):
            steps.record(self._hidden, torch.tensor([0, FEW - 1]))
            steps.record(self._logits)
            if self._finds_best and self.overlaps:
                steps.record(self._draw, slots, torch.empty_like(slots))
            elif self._finds_best:
                steps.record(self._tokens)

    def _launched(self, chunks: tuple[Chunk, ...], slots: Ints, pending: PendingSample) -> Launched:
        return Launched(chunks=chunks, slots=slots, starts=self._slots.starts[slots], pending=pending)

    def _remember(self, slots: Tensor, pending: PendingSample) -> None:
        if self.overlaps:
            self._drawn.index_copy_(0, slots, pending.tokens.clamp(min=0))

    def _launch_singles(self, steps: RecordedSteps, chunks: tuple[Chunk, ...]) -> Launched:
        """Single tokens that all sample; greedy ones alone run beside the caller."""
        batch, where = steps.batch(chunks)
        slots = where.numpy()
        if self._finds_best and self._sampler.all_plain(slots):
            if self.overlaps:
                tokens = torch.empty_like(where)
                return self._launched(chunks, slots, self._sampler.take(tokens, steps.start(self._draw, batch, where, tokens)))
            return self._launched(chunks, slots, self._sampler.take(steps.run(self._tokens, batch)))
        self._settle()
        if any(chunk.follows for chunk in chunks):
            batch = replace(batch, input_ids=known_ids(batch.input_ids, where, self._drawn))
        said = batch.positions.numpy() + 1 - self._slots.num_prompt[slots]
        pending = self._sampler.launch(steps.run(self._logits, batch), slots, said)
        self._remember(where, pending)
        return self._launched(chunks, slots, pending)

    def _settle(self) -> None:
        """Waits for steps that run beside the caller: what comes next computes on its own thread, and with what they draw."""
        if self._recorded_steps is not None:
            self._recorded_steps.settle()

    def _draw(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, slots: Tensor, tokens: Tensor) -> Tensor:
        """Every row's greedy token into `tokens`, [T] int64, and as what its slot drew last; an id may be what the slot drew before."""
        input_ids = known_ids(input_ids, slots, self._drawn)
        tokens.copy_(self._tokens(input_ids, positions, metadata))
        self._drawn.index_copy_(0, slots, tokens.clamp(min=0))
        return tokens

    def _every(self, batch: HostBatch, best: bool) -> Tensor:
        """Logits of a step of single tokens that all sample, [T, vocab] float32; `best`: its greedy tokens, [T] int64."""
        logits = self._captured.logits(batch) if self._captured is not None else None
        if logits is not None:
            return logits
        every = self._tokens if best else self._logits
        return every(*self._to_device(batch))

    def _some(self, batch: HostBatch) -> Tensor:
        """Hidden states of the rows that any other step wants, [N, H]."""
        hidden = self._captured.hidden(batch) if self._captured is not None else None
        if hidden is not None:
            return hidden
        sent = self._to_device(batch)
        return self._hidden(*sent) if self._recorded_steps is None else self._recorded_steps.run_chunks(self._hidden, *sent)

    def _hidden(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, rows: Tensor | None) -> Tensor:
        """[T] ids and positions to [N, H] hidden states of `rows`, [N] int64; None: of all."""
        batch = ForwardBatch(
            attention=self._backend.prepare(metadata), backend=self._backend, caches=self._caches, logits_indices=rows
        )
        return self._model.forward(input_ids, positions, batch)

    def _logits(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, rows: Tensor | None = None) -> Tensor:
        """[T] ids and positions to [T, vocab] float32: every row's, whatever `rows` are."""
        return self._model.compute_logits(self._hidden(input_ids, positions, metadata, None))

    def _tokens(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, rows: Tensor | None = None) -> Tensor:
        """[T] ids and positions to [T] int64: every row's greedy token, whatever `rows` are."""
        return self._model.best_tokens(self._hidden(input_ids, positions, metadata, None))

    def _batch(self, slots: Ints, starts: Ints, lengths: Ints, sampling: Ints, follows: Ints) -> HostBatch:
        """The flat batch of chunks, [num_seqs] each, in plan order; `sampling`: which of them sample. Only single tokens follow."""
        table, block_size, num_seqs = self._slots, self._block_size, len(slots)
        seq_lens = starts + lengths
        query_start_loc = np.zeros(num_seqs + 1, np.int64)
        np.cumsum(lengths, out=query_start_loc[1:])
        total = int(query_start_loc[-1])
        row, positions, singles, longest_query = slots, starts, num_seqs, 1
        if total > num_seqs:
            row = np.repeat(slots, lengths)
            positions = np.arange(total) + np.repeat(starts - query_start_loc[:-1], lengths)
            singles, longest_query = int((lengths != 1).argmax()), int(lengths.max())
        columns, offsets = np.divmod(positions, block_size)
        longest = int(seq_lens.max())
        input_ids = table.tokens[row, positions]
        if follows.any():
            input_ids[:singles][follows[:singles] > 0] = ON_DEVICE
        return HostBatch(
            input_ids=input_ids,
            positions=positions.copy(),
            slots=row,
            query_start_loc=query_start_loc.astype(np.int32),
            seq_lens=seq_lens.astype(np.int32),
            block_tables=table.blocks[slots, : -(-longest // block_size)],
            slot_mapping=table.blocks[row, columns].astype(np.int64) * block_size + offsets,
            rows=query_start_loc[1:][sampling] - 1,
            num_single_token_chunks=singles,
            max_query_len=longest_query,
            max_seq_len=longest,
        )

    def _to_device(self, batch: HostBatch) -> tuple[Tensor, Tensor, AttentionMetadata, Tensor]:
        """The batch's ids, positions, metadata and rows on the device."""
        metadata = AttentionMetadata(
            query_start_loc=self._sent(batch.query_start_loc),
            seq_lens=self._sent(batch.seq_lens),
            block_tables=self._sent(batch.block_tables),
            slot_mapping=self._sent(batch.slot_mapping),
            num_single_token_chunks=batch.num_single_token_chunks,
            max_query_len=batch.max_query_len,
            max_seq_len=batch.max_seq_len,
        )
        input_ids = self._sent(batch.input_ids)
        if (batch.input_ids == ON_DEVICE).any():
            input_ids = known_ids(input_ids, self._sent(batch.slots), self._drawn)
        return input_ids, self._sent(batch.positions), metadata, self._sent(batch.rows)

    def _sent(self, array: NDArray[np.generic]) -> Tensor:
        return to_device(torch.from_numpy(array), self._device)
