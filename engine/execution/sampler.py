"""Chooses the next token of every row of a step at once.

A row's result is a function of its logits, its request's parameters, its tokens so far and (seed, choice, output position):
batch mates, slots and steps cannot matter. Order: logit bias, penalties, minimum length; then greedy, or temperature, top-k,
top-p, min-p and one draw by inverse CDF in token-id order. Log-probabilities are of the model's own logits, before all that.
A row without a finite best value (NaN, +inf, nothing left) is reported as not finite; others never notice.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.execution.draws import uniforms
from engine.execution.filters import inverse_cdf, keep_from, keep_thresholds, pad_to_blocks, row_best
from engine.execution.sampling_table import SamplingTable
from engine.output import TokenLogprobs
from engine.scheduling.step import ChunkResult, SequenceStart

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RawLogprobs:
    """For the rows of a step that asked: normalisers [M], the best ids and logits [M, k], and the raw rows' place."""

    rows: Rows
    chosen: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingSample:
    """Tokens on the device: tokens [N] int64, finite [N] bool; `counts` [N] is how many logprobs each row asked (-1: none)."""

    tokens: Tensor
    finite: Tensor
    counts: Rows
    logprobs: RawLogprobs | None


class Sampler:
    """Sampling for `num_slots` request slots. Launch touches no host value of the device where no filter needs one."""

    def __init__(self, *, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._buffers: Tensor | None = None
        self._table = SamplingTable(num_slots=num_slots, vocab_size=vocab_size, device=device)

    def start(self, start: SequenceStart) -> None:
        """Gives a slot to a sequence, whatever it held before."""
        self._table.start(start)

    def launch(self, logits: Tensor, slots: Rows, positions: Rows) -> PendingSample:
        """Starts choosing. logits: [N, V] float32, left as they are; slots, positions: [N], positions count output tokens from 0."""
        table = self._table
        rows = pad_to_blocks(logits)
        values, tokens = row_best(rows)
        adjusted = np.flatnonzero(table.penalised[slots] | table.biased[slots] | (positions < table.min_tokens[slots]))
        if adjusted.size:
            index = self._index(adjusted)
            changed = pad_to_blocks(self._adjust(logits[index], slots[adjusted], positions[adjusted]))
            if rows is logits:
                rows = rows.clone()
            rows[index] = changed
            best, first = row_best(changed)
            tokens[index] = first
            # The model's own row must be finite too: a mask may not hide a NaN.
            values[index] = torch.where(torch.isfinite(values[index]), best, values[index])
        drawn = np.flatnonzero(~table.greedy[slots])
        if drawn.size:
            index = self._index(drawn)
            tokens[index] = self._draw(rows, values[index], drawn, slots[drawn], positions[drawn])
        counts = table.num_logprobs[slots]
        pending = PendingSample(
            tokens=tokens, finite=torch.isfinite(values), counts=counts, logprobs=self._raw_logprobs(logits, tokens, counts)
        )
        # Last, so that a launch that ran out of memory can be repeated.
        penalised = np.flatnonzero(table.penalised[slots])
        if penalised.size:
            table.count(slots[penalised], tokens[self._index(penalised)])
        return pending

    def collect(self, pending: PendingSample) -> list[ChunkResult]:
        """Waits for the device; one result a row, in order."""
        tokens, finite = pending.tokens.tolist(), pending.finite.tolist()
        logprobs: dict[int, TokenLogprobs] = {}
        if pending.logprobs is not None:
            raw = pending.logprobs
            columns = zip(raw.rows.tolist(), raw.chosen.tolist(), raw.top_ids.tolist(), raw.top_logprobs.tolist(), strict=True)
            for row, chosen, ids, values in columns:
                best = sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
                logprobs[row] = TokenLogprobs(token_id=tokens[row], logprob=chosen, top=tuple(best[: int(pending.counts[row])]))
        return [
            ChunkResult(token_ids=(token,), logprobs=(logprobs[row],) if row in logprobs else None)
            if ok
            else ChunkResult(finite=False)
            for row, (token, ok) in enumerate(zip(tokens, finite, strict=True))
        ]

    def _index(self, rows: Rows) -> Tensor:
        return torch.from_numpy(rows).to(self._device)

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

    def _draw(self, rows: Tensor, best: Tensor, drawn: Rows, slots: Rows, positions: Rows) -> Tensor:
        """One token for each of the `drawn` rows. rows: [N, V'], read only; best, slots, positions: of the drawn rows."""
        table = self._table
        index = self._index(drawn)
        scaled, weights, spare = self._workspace(len(drawn), rows.shape[1])
        heat = torch.from_numpy((1.0 / table.temperature[slots]).astype(np.float32)).to(self._device)
        torch.index_select(rows, 0, index, out=scaled).sub_(best.unsqueeze(1)).mul_(heat.unsqueeze(1))
        torch.exp(scaled, out=weights)
        top_k, top_p, min_p = table.top_k[slots], table.top_p[slots], table.min_p[slots]
        filtered = np.flatnonzero((top_k > 0) | (top_p < 1.0) | (min_p > 0.0))
        if filtered.size:
            with np.errstate(divide="ignore"):
                floor = torch.from_numpy(np.log(min_p[filtered]).astype(np.float32)).to(self._device)
            every = len(filtered) == len(drawn)
            picked = self._index(filtered)
            part, mass = (scaled, weights) if every else (scaled[picked], weights[picked])
            spare = spare[: len(filtered)]
            floor = torch.maximum(floor, keep_thresholds(part, mass, top_k[filtered], top_p[filtered], spare))
            keep_from(part, mass, floor, spare)
            if not every:
                weights[picked] = mass
        draws = uniforms(table.seed[slots], table.choice[slots], positions)
        return inverse_cdf(weights, torch.from_numpy(draws).to(self._device))

    def _workspace(self, num_rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Three float32 [num_rows, width] buffers that are kept: fresh memory of this size costs more than the arithmetic."""
        if self._buffers is None or self._buffers.shape[1] < num_rows:
            self._buffers = None
            self._buffers = torch.empty((3, num_rows, width), dtype=torch.float32, device=self._device)
        return self._buffers[0, :num_rows], self._buffers[1, :num_rows], self._buffers[2, :num_rows]

    def _raw_logprobs(self, logits: Tensor, tokens: Tensor, counts: Rows) -> RawLogprobs | None:
        wanted = np.flatnonzero(counts >= 0)
        if not wanted.size:
            return None
        index = self._index(wanted)
        raw = logits[index]
        normaliser = raw.logsumexp(dim=-1, keepdim=True)
        top = raw.topk(min(int(counts.max()), raw.shape[1]), dim=-1)
        return RawLogprobs(
            rows=wanted,
            chosen=(raw.gather(1, tokens[index].unsqueeze(1)) - normaliser).squeeze(1),
            top_ids=top.indices,
            top_logprobs=top.values - normaliser,
        )
