"""Lengths and texts of a load."""

import itertools
import random
import statistics

import pytest

from service.bench.lengths import SHAPES, Draw, Lengths, Shape, exponential
from service.bench.workload import Planned, Workload


def first(count: int, shape: Shape, *, seed: int = 0, prefix: int = 0, stream: str = "") -> list[Planned]:
    workload = Workload(lengths=Lengths(shape=shape, prompt_tokens=40, output_tokens=20), shared_prefix_tokens=prefix)

    def new_draw(stream: str) -> Draw:
        return random.Random(f"{seed} {stream}").random

    return list(itertools.islice(workload.requests(new_draw, stream), count))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_seed_gives_the_same_requests_each_time(shape: Shape) -> None:
    assert first(50, shape) == first(50, shape)
    assert first(50, shape) != first(50, shape, seed=1)


def test_fixed_lengths_are_the_means() -> None:
    assert {(len(planned.text.split()), planned.max_tokens) for planned in first(20, "fixed")} == {(40, 20)}


@pytest.mark.parametrize("shape", ["sharegpt", "powerlaw"])
def test_spread_lengths_have_the_mean_asked_for_and_a_tail_that_is_cut(shape: Shape) -> None:
    """The cut at 16 means takes a little of the mean away."""
    drawn = [planned.max_tokens for planned in first(20_000, shape)]
    assert statistics.mean(drawn) == pytest.approx(20, rel=0.15)
    assert statistics.median(drawn) < 20 < max(drawn) <= 320
    assert min(drawn) >= 1


def test_prompts_share_their_prefix_and_nothing_else() -> None:
    one, other = first(2, "fixed", prefix=100)
    [of_another_run] = first(1, "fixed", prefix=100, stream="another")
    assert of_another_run.text.split()[:100] == one.text.split()[:100]
    assert of_another_run.text.split()[100:] != one.text.split()[100:]
    assert one.text.split()[:100] == other.text.split()[:100]
    assert one.text.split()[100:] != other.text.split()[100:]
    assert len(one.text.split()) == 140


def test_arrivals_of_a_rate_come_at_that_rate() -> None:
    uniform = random.Random(3).random
    gaps = [exponential(50.0, uniform) for _ in range(20_000)]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.05)
