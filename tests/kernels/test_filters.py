"""Thresholds and masks against transformers' own warpers, where they have one."""

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.execution.sampling_table import SamplingTable
from engine.request import SamplingParams
from engine.scheduling.step import SequenceStart
from kernels.filters import keep_thresholds, pad_to_blocks, row_best, sorted_prefix


def _logits(rows: int, vocab: int, seed: int, spread: float) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def _kept(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """What our thresholds keep: [N, V] bool."""
    scaled = pad_to_blocks((logits - logits.amax(-1, keepdim=True)) / temperature)
    rows = len(logits)
    floor = keep_thresholds(
        scaled, scaled.exp(), torch.full((rows,), top_k), torch.full((rows,), top_p).double(), torch.empty_like(scaled)
    )
    if min_p:
        floor = floor.clamp(min=float(np.log(min_p)))
    return scaled[:, : logits.shape[1]] >= floor.unsqueeze(1)


@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 0.9, 0.0), (0, 0.3, 0.0), (40, 1.0, 0.0), (1, 1.0, 0.0), (300, 0.8, 0.0), (0, 1.0, 0.1), (50, 0.95, 0.02)],
)
def test_the_kept_tokens_are_those_of_transformers(top_k: int, top_p: float, min_p: float, spread: float) -> None:
    """Temperature, top-k, top-p, min-p in transformers' order keep the same tokens over 8 rows of 5,000."""
    logits = _logits(8, 5000, 11, spread)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    expected = torch.isfinite(warpers(torch.zeros(8, 1, dtype=torch.long), logits.double()))
    assert torch.equal(_kept(logits, 0.7, top_k, top_p, min_p), expected)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    """Prompt and output tokens alike, positive and negative logits."""
    logits = _logits(1, 500, 2, 2.0)
    table = SamplingTable(num_slots=2, vocab_size=500, device=torch.device("cpu"))
    ids = (3, 77, 77, 400, 12)
    params = SamplingParams(max_tokens=8, seed=0, repetition_penalty=1.4)
    table.start(SequenceStart(slot=1, token_ids=ids, num_prompt_tokens=3, choice=0, sampling=params, stop_token_ids=()))
    expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([ids]), logits.clone())
    assert torch.equal(table.penalise(logits, np.array([1])), expected)


@pytest.mark.parametrize("vocab", [64, 97, 4096, 49_152])
@pytest.mark.parametrize("length", [1, 40, 128])
def test_a_sorted_prefix_holds_the_best_values(vocab: int, length: int) -> None:
    """With many equal values too."""
    rows = pad_to_blocks((_logits(4, vocab, length, 1.0) * 8).round())
    length = min(length, vocab)
    assert torch.equal(sorted_prefix(rows, length), rows.sort(dim=-1, descending=True).values[:, :length])


@pytest.mark.parametrize("vocab", [1, 63, 64, 100, 1000])
def test_the_best_of_a_row_is_its_first_greatest_value(vocab: int) -> None:
    """Odd sizes, repeated maxima."""
    logits = (_logits(5, vocab, vocab, 1.0) * 2).round()
    values, indices = row_best(pad_to_blocks(logits))
    expected = [row.tolist().index(max(row.tolist())) for row in logits]
    assert indices.tolist() == expected
    assert torch.equal(values, logits.amax(-1))


def test_equal_values_at_the_threshold_do_not_depend_on_their_order() -> None:
    """A permuted row keeps the permuted set."""
    logits = (_logits(1, 3000, 9, 1.5) * 3).round() / 3
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(1))
    kept = _kept(logits, 1.0, 70, 0.8, 0.0)
    assert torch.equal(_kept(logits[:, order], 1.0, 70, 0.8, 0.0), kept[:, order])
