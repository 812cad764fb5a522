"""greedy, sample and logprobs: what holds for every implementation that this machine can run, and equality with the reference."""

import math
from collections.abc import Iterator

import pytest
import torch

from kernels import reference
from kernels.ops import Operators
from tests.kernels.sampling_cases import KINDS, VOCABULARIES, make_case
from tests.kernels.sampling_implementations import IMPLEMENTATIONS, operators_of


@pytest.fixture(params=IMPLEMENTATIONS)
def operators(request: pytest.FixtureRequest) -> Iterator[Operators]:
    yield operators_of(request.param)
    operators_of("auto")


@pytest.mark.parametrize("vocab", [1, 63, 64, 100, 1000, 49_152])
def test_greedy_gives_the_first_greatest_value(operators: Operators, vocab: int) -> None:
    """Odd sizes, repeated maxima, at the end of the row too."""
    logits = (torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab)) * 2).round()
    logits[4] = 0.0
    logits[4, -1] = 1.0
    assert operators.greedy(logits).tolist() == [row.index(max(row)) for row in logits.tolist()]


@pytest.mark.parametrize("place", [0, 15, 63, 64, 99])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_minus_one(operators: Operators, bad: float, place: int) -> None:
    """NaN or +inf anywhere; the row beside it is not touched by it."""
    logits = torch.randn(2, 100, generator=torch.Generator().manual_seed(1))
    wanted = operators.greedy(logits)[1].item()
    logits[0, place] = bad
    assert operators.greedy(logits).tolist() == [-1, wanted]
    filters, draws = torch.tensor([[1.0, 5, 0.9, 0.1]] * 2).double(), torch.tensor([[1, 0, 0]] * 2)
    assert operators.sample(logits, filters, draws)[0].item() == -1


def test_a_row_without_a_finite_value_is_minus_one(operators: Operators) -> None:
    """All -inf; a row with one finite value has that one, however it is sampled."""
    logits = torch.full((2, 130), -math.inf)
    logits[1, 129] = -5.0
    filters, draws = torch.tensor([[1.0, 0, 0.9, 0.0]] * 2).double(), torch.tensor([[1, 0, 0]] * 2)
    assert operators.greedy(logits).tolist() == [-1, 129]
    assert operators.sample(logits, filters, draws).tolist() == [-1, 129]


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("kind", KINDS)
def test_sample_says_what_the_reference_says(operators: Operators, kind: str, vocab: int) -> None:
    """Twelve rows of random filters and draws over hard logits: the same tokens."""
    case = make_case(vocab, kind, vocab, 12)
    expected = reference.sample(case.logits, case.filters, case.draws).tolist()
    assert operators.sample(case.logits, case.filters, case.draws).tolist() == expected


def test_a_row_depends_on_itself_alone(operators: Operators) -> None:
    """Alone, among others, in another place and with another number of threads: the same token."""
    case = make_case(5, "normal", 5000, 16)
    together = operators.sample(case.logits, case.filters, case.draws).tolist()
    backwards = operators.sample(case.logits.flip(0), case.filters.flip(0), case.draws.flip(0)).tolist()
    alone = [operators.sample(*case.row(i)).item() for i in range(16)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads != 3 else 2)
        threaded = operators.sample(case.logits, case.filters, case.draws).tolist()
    finally:
        torch.set_num_threads(threads)
    assert together == backwards[::-1] == alone == threaded


def test_logits_stay_as_they_are(operators: Operators) -> None:
    """No operator writes to its input."""
    case = make_case(6, "normal", 1000, 4)
    before = case.logits.clone()
    operators.greedy(case.logits)
    operators.sample(case.logits, case.filters, case.draws)
    operators.logprobs(case.logits, torch.zeros(4, dtype=torch.int64), 5)
    assert torch.equal(case.logits, before)


@pytest.mark.parametrize(("vocab", "count"), [(1, 1), (63, 20), (100, 0), (49_152, 20)])
def test_logprobs_are_the_log_softmax_and_its_best(operators: Operators, vocab: int, count: int) -> None:
    """Within a few roundings of float64; the best first, equal values by id."""
    logits = (torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab)) * 6).round() / 2
    tokens = torch.arange(6) % vocab
    wanted = torch.log_softmax(logits.double(), dim=-1)
    chosen, ids, top = operators.logprobs(logits, tokens, count)
    assert (chosen.double() - wanted[torch.arange(6), tokens]).abs().max() < 2e-6
    expected = [sorted(range(vocab), key=lambda i, row=row: (-row[i], i))[:count] for row in logits.tolist()]
    assert ids.tolist() == expected
    assert top.shape == (6, count)
    if count:
        assert (top.double() - wanted.gather(1, ids)).abs().max() < 2e-6
