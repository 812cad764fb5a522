"""The ranges of what a caller may ask for."""

import numpy as np
import pytest
import torch

from engine.errors import InvalidFieldError
from engine.execution.sampling_table import SamplingTable
from engine.request import MIN_REPETITION_PENALTY, SamplingParams
from engine.scheduling.step import SequenceStart


@pytest.mark.parametrize("value", [0.0, 1e-39, 0.0099, 2.01, float("nan")])
def test_a_repetition_penalty_out_of_range_is_refused_by_name(value: float) -> None:
    with pytest.raises(InvalidFieldError, match=r"must lie in \[0\.01, 2\]") as caught:
        SamplingParams(max_tokens=1, seed=0, repetition_penalty=value)
    assert caught.value.field == "sampling.repetition_penalty"


def test_the_least_repetition_penalty_leaves_logits_finite() -> None:
    """Of a size that no model gives."""
    table = SamplingTable(num_slots=1, vocab_size=2, device=torch.device("cpu"))
    params = SamplingParams(max_tokens=1, seed=0, repetition_penalty=MIN_REPETITION_PENALTY)
    table.start(SequenceStart(slot=0, token_ids=(0, 1), num_prompt_tokens=2, choice=0, sampling=params, stop_token_ids=()))
    assert table.penalise(torch.tensor([[1e30, -1e30]]), np.array([0])).isfinite().all()
