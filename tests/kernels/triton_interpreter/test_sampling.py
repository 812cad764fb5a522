"""Triton's sampling, interpreted, against the reference: the same tokens."""

import math

import pytest
import torch

from kernels import reference
from kernels.triton import sampling, tuning
from tests.kernels.sampling_cases import KINDS, make_case

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of rows that are not finite


@pytest.fixture(autouse=True)
def _small_chunks(nan_filled_results: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several chunks and tiles without tens of thousands of logits; results start as NaN."""
    monkeypatch.setattr(tuning, "SAMPLE_CHUNK", 64)
    monkeypatch.setattr(tuning, "LIMIT_TILE", 256)


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 300])
def test_greedy_gives_the_first_greatest_value(vocab: int) -> None:
    logits = (torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab)) * 2).round()
    logits[4] = 0.0
    logits[4, -1] = 1.0
    assert sampling.greedy(logits).tolist() == [row.index(max(row)) for row in logits.tolist()]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 63, 64, 99])
def test_a_row_that_is_not_finite_is_minus_one_however_it_is_chosen(bad: float, place: int) -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    logits[1] = -math.inf
    logits[0, place] = bad
    wanted = int(logits[2].argmax())
    filters, draws = torch.tensor([[1.0, 1, 0.9, 0.1]] * 3).double(), torch.tensor([[1, 0, 0]] * 3)
    assert sampling.greedy(logits).tolist() == sampling.sample(logits, filters, draws).tolist() == [-1, -1, wanted]


@pytest.mark.parametrize("vocab", [1, 64, 65, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_sample_says_what_the_reference_says(kind: str, vocab: int) -> None:
    case = make_case(vocab, kind, vocab, 6)
    before = case.logits.clone()
    expected = reference.sample(case.logits, case.filters, case.draws).tolist()
    assert sampling.sample(case.logits, case.filters, case.draws).tolist() == expected
    assert torch.equal(case.logits.nan_to_num(), before.nan_to_num())


def test_a_row_depends_on_itself_alone() -> None:
    case = make_case(5, "normal", 500, 6)
    together = sampling.sample(case.logits, case.filters, case.draws).tolist()
    alone = [sampling.sample(*case.row(i)).item() for i in range(6)]
    assert together == alone


def test_no_rows_give_no_tokens_and_other_types_are_refused() -> None:
    assert sampling.greedy(torch.empty(0, 64)).shape == (0,)
    with pytest.raises(ValueError, match="contiguous float32"):
        sampling.greedy(torch.randn(4, 64).T)
    with pytest.raises(ValueError, match="contiguous float32"):
        sampling.greedy(torch.randn(4, 64, dtype=torch.float64))
