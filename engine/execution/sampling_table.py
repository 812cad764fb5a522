"""What each request slot asks of sampling, in arrays, so that a step reads all its rows with a few gathers.

Owner of the penalty counts. `start` replaces everything that a slot held; nothing else resets it. The dense counts
([num_slots, vocab] int32 and a bool of the same shape for the prompt) are allocated when the first request with a penalty comes.
"""

import numpy as np
import torch
from torch import Tensor

from engine.scheduling.step import SequenceStart
from kernels.transfer import to_device

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: the division would only turn every other logit into -inf."""


class SamplingTable:
    """Parameters and penalty counts of `num_slots` slots over a vocabulary of `vocab_size`.

    `filters`: [num_slots, 4], temperature (0: greedy), top-k, top-p, min-p; `streams`: [num_slots, 2], seed and choice, as
    `kernels.reference.sample` takes them. `plain`: greedy and nothing else.
    """

    def __init__(self, *, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._shape = (num_slots, vocab_size)
        self.filters = np.zeros((num_slots, 4), np.float64)
        self.streams = np.zeros((num_slots, 2), np.int64)
        self.repetition = np.ones(num_slots, np.float32)
        self.frequency = np.zeros(num_slots, np.float32)
        self.presence = np.zeros(num_slots, np.float32)
        self.min_tokens = np.zeros(num_slots, np.int64)
        self.num_logprobs = np.full(num_slots, -1, np.int64)
        self.plain = np.ones(num_slots, np.bool_)
        self.penalised = np.zeros(num_slots, np.bool_)
        self.biased = np.zeros(num_slots, np.bool_)
        self._bias: dict[int, tuple[Tensor, Tensor]] = {}
        self._stops: dict[int, Tensor] = {}
        self._output_counts: Tensor | None = None
        self._in_prompt: Tensor | None = None

    def start(self, start: SequenceStart) -> None:
        """Gives the slot to a sequence; `start.token_ids` beyond the prompt count as output."""
        slot, params = start.slot, start.sampling
        temperature = 0.0 if params.temperature < GREEDY_BELOW else params.temperature
        self.filters[slot] = (temperature, max(params.top_k, 0), params.top_p, params.min_p)
        self.streams[slot] = (params.seed, start.choice)
        self.repetition[slot] = params.repetition_penalty
        self.frequency[slot] = params.frequency_penalty
        self.presence[slot] = params.presence_penalty
        self.num_logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self.min_tokens[slot] = params.min_tokens if start.stop_token_ids else 0
        if self.min_tokens[slot]:
            self._stops[slot] = self._ids(start.stop_token_ids)
        self.biased[slot] = bool(params.logit_bias)
        if params.logit_bias:
            values = to_device(torch.tensor(list(params.logit_bias.values()), dtype=torch.float32), self._device)
            self._bias[slot] = (self._ids(tuple(params.logit_bias)), values)
        self.penalised[slot] = (
            params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
        )
        if self.penalised[slot]:
            self._count_all(start)
        adjusted = self.penalised[slot] or self.biased[slot] or self.min_tokens[slot] > 0
        self.plain[slot] = temperature == 0.0 and params.logprobs is None and not adjusted

    def _ids(self, token_ids: tuple[int, ...]) -> Tensor:
        return to_device(torch.tensor(token_ids, dtype=torch.int64), self._device)

    def _each(self, values: np.ndarray) -> Tensor:
        """[N] values, one a row, as [N, 1] on the device."""
        return to_device(torch.from_numpy(values), self._device).unsqueeze(1)

    def _count_all(self, start: SequenceStart) -> None:
        counts, in_prompt = self._counts()
        counts[start.slot].zero_()
        in_prompt[start.slot].zero_()
        in_prompt[start.slot][self._ids(start.token_ids[: start.num_prompt_tokens])] = True
        said = self._ids(start.token_ids[start.num_prompt_tokens :])
        if said.numel():
            counts[start.slot].index_add_(0, said, torch.ones_like(said, dtype=torch.int32))

    def _counts(self) -> tuple[Tensor, Tensor]:
        if self._output_counts is None or self._in_prompt is None:
            self._output_counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
            self._in_prompt = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        return self._output_counts, self._in_prompt

    def add_bias(self, logits: Tensor, slot: int) -> None:
        """Adds the slot's logit bias to its row in place. logits: [V] float32."""
        ids, values = self._bias[slot]
        logits.index_add_(0, ids, values)

    def mask_stops(self, logits: Tensor, slot: int) -> None:
        """Takes the slot's stop ids out of its row in place. logits: [V] float32."""
        logits[self._stops[slot]] = float("-inf")

    def penalise(self, logits: Tensor, slots: np.ndarray) -> Tensor:
        """Repetition (Keskar et al. 2019: seen tokens' positive logits / r, negative ones x r), then frequency and presence.

        logits: [N, V] float32, one row a slot; returns the changed rows.
        """
        counts, in_prompt = self._counts()
        index = to_device(torch.from_numpy(slots), self._device)
        said = counts[index]
        factor = self._each(self.repetition[slots])
        frequency = self._each(self.frequency[slots])
        presence = self._each(self.presence[slots])
        scaled = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(in_prompt[index] | (said > 0), scaled, logits)
        return logits - frequency * said - presence * (said > 0)

    def count(self, slots: np.ndarray, tokens: Tensor) -> None:
        """Counts one more output token a penalised slot, on the device. tokens: [N] int64."""
        counts, _ = self._counts()
        index = to_device(torch.from_numpy(slots), self._device)
        counts[index, tokens] += 1
