"""Chooses the next token of every row of a step at once.

A row's result is a function of its logits, its request's parameters, its tokens so far and (seed, choice, output position):
batch mates, slots and steps cannot matter. Order: logit bias, penalties, minimum length; then what `kernels.reference.sample` says.
Log-probabilities are of the model's own logits, before all that.
A row without a finite best value (NaN, +inf, nothing left) is reported as not finite; others never notice.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.execution.sampling_table import SamplingTable
from engine.output import TokenLogprobs
from engine.scheduling.step import ChunkResult, SequenceStart
from kernels.ops import Operators
from kernels.transfer import to_device, to_host

Rows = NDArray[np.int64]
_NOT_FINITE = ChunkResult(finite=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RawLogprobs:
    """Of the rows of a step that asked: their places, how many alternatives each wants, and what `kernels.reference.logprobs` gives."""

    rows: Rows
    counts: Rows
    chosen: Tensor
    top_ids: Tensor
    top: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """[N] int64 tokens, -1 where the row is not finite, and what belongs to them."""

    tokens: Tensor
    logprobs: RawLogprobs | None = None


class Arrival(Protocol):
    """Something that comes to pass beside the caller: an event of a GPU, a step that runs on other threads."""

    def synchronize(self) -> None:
        """Waits for it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingSample:
    """Tokens on the device, and all that was drawn as it will be on the host once `arrived` has come to pass (None: it is there)."""

    tokens: Tensor
    on_host: Drawn
    arrived: Arrival | None


class Sampler:
    """Sampling for `num_slots` request slots. Launch waits for no value of the device."""

    def __init__(self, *, num_slots: int, vocab_size: int, device: torch.device, operators: Operators) -> None:
        self._device = device
        self._ops = operators
        self._table = SamplingTable(num_slots=num_slots, vocab_size=vocab_size, device=device)

    def start(self, start: SequenceStart) -> None:
        """Gives a slot to a sequence, whatever it held before."""
        self._table.start(start)

    def all_plain(self, slots: Rows) -> bool:
        """Whether these slots want the greedy token and nothing else, so that it may be found without `launch`."""
        return bool(self._table.plain[slots].all())

    def take(self, tokens: Tensor, arrived: Arrival | None = None) -> PendingSample:
        """Starts with tokens that are chosen, or on a CPU will be once they have `arrived`. tokens: [N] int64, as
        `kernels.reference.greedy` gives them of plain slots."""
        if arrived is not None:
            return PendingSample(tokens=tokens, on_host=Drawn(tokens=tokens), arrived=arrived)
        return self._pending(tokens)

    def launch(self, logits: Tensor, slots: Rows, positions: Rows) -> PendingSample:
        """Starts choosing. logits: [N, V] float32, left as they are; slots, positions: [N], positions count output tokens from 0."""
        table = self._table
        if self.all_plain(slots):
            return self._pending(self._ops.greedy(logits))
        rows, index, finite = logits, None, None
        adjusted = np.flatnonzero(table.penalised[slots] | table.biased[slots] | (positions < table.min_tokens[slots]))
        if adjusted.size:
            index = self._index(adjusted)
            own = logits[index]
            finite = self._ops.greedy(own) >= 0
            rows = logits.clone()
            rows[index] = self._adjust(own, slots[adjusted], positions[adjusted])
        draws = np.column_stack((table.streams[slots], positions))
        tokens = self._ops.sample(rows, torch.from_numpy(table.filters[slots]), torch.from_numpy(draws))
        if index is not None and finite is not None:
            # The model's own row must be finite too: a mask may not hide a NaN.
            tokens[index] = torch.where(finite, tokens[index], -1)
        pending = self._pending(tokens, self._raw_logprobs(logits, tokens, table.num_logprobs[slots]))
        # Last: what a launch that ran out of memory has counted would count twice (a start counts anew).
        penalised = np.flatnonzero(table.penalised[slots])
        if penalised.size:
            table.count(slots[penalised], tokens[self._index(penalised)].clamp(min=0))
        return pending

    def collect(self, pending: PendingSample) -> list[ChunkResult]:
        """Waits for the device; one result a row, in order."""
        if pending.arrived is not None:
            pending.arrived.synchronize()
        tokens = pending.on_host.tokens.tolist()
        raw = pending.on_host.logprobs
        if raw is None:
            return [ChunkResult(token_ids=(token,)) if token >= 0 else _NOT_FINITE for token in tokens]
        found = {}
        columns = (raw.rows.tolist(), raw.counts.tolist(), raw.chosen.tolist(), raw.top_ids.tolist(), raw.top.tolist())
        for row, count, chosen, ids, values in zip(*columns, strict=True):
            top = tuple(zip(ids[:count], values[:count], strict=True))
            found[row] = (TokenLogprobs(token_id=tokens[row], logprob=chosen, top=top),)
        return [
            ChunkResult(token_ids=(token,), logprobs=found.get(row)) if token >= 0 else _NOT_FINITE
            for row, token in enumerate(tokens)
        ]

    def _pending(self, tokens: Tensor, logprobs: RawLogprobs | None = None) -> PendingSample:
        """Sends what was drawn on its way to the host: a copy that waited for `collect` would wait for the step after, too."""
        if logprobs is not None:
            parts = (logprobs.chosen, logprobs.top_ids, logprobs.top)
            chosen, top_ids, top = (to_host(part) for part in parts)
            logprobs = replace(logprobs, chosen=chosen, top_ids=top_ids, top=top)
        on_host, arrived = Drawn(tokens=to_host(tokens), logprobs=logprobs), None
        if self._device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        return PendingSample(tokens=tokens, on_host=on_host, arrived=arrived)

    def _index(self, rows: Rows) -> Tensor:
        return to_device(torch.from_numpy(rows), self._device)

    def _adjust(self, logits: Tensor, slots: Rows, positions: Rows) -> Tensor:
        table = self._table
        for row in np.flatnonzero(table.biased[slots]):
            table.add_bias(logits[row], int(slots[row]))
        penalised = np.flatnonzero(table.penalised[slots])
        if penalised.size:
            index = self._index(penalised)
            logits[index] = table.penalise(logits[index], slots[penalised])
        for row in np.flatnonzero(positions < table.min_tokens[slots]):
            table.mask_stops(logits[row], int(slots[row]))
        return logits

    def _raw_logprobs(self, logits: Tensor, tokens: Tensor, counts: Rows) -> RawLogprobs | None:
        wanted = np.flatnonzero(counts >= 0)
        if not wanted.size:
            return None
        index = self._index(wanted)
        most = min(int(counts.max()), logits.shape[1])
        chosen, top_ids, top = self._ops.logprobs(logits[index], tokens[index].clamp(min=0), most)
        return RawLogprobs(rows=wanted, counts=counts[wanted], chosen=chosen, top_ids=top_ids, top=top)
