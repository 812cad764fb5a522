"""Back-pressure in tokens."""

import pytest

from service.kafka.budget import IntakeBudget, estimate


def test_it_closes_above_high_and_opens_at_low_only() -> None:
    budget = IntakeBudget(high=100, low=40)
    budget.hold(100)
    assert budget.open("standard")
    budget.hold(1)
    assert not budget.open("standard")
    budget.release(60)
    assert not budget.open("standard")
    budget.release(1)
    assert budget.open("standard")


def test_the_batch_class_waits_first() -> None:
    budget = IntakeBudget(high=100, low=40)
    budget.hold(51)
    assert (budget.open("batch"), budget.open("standard"), budget.open("interactive")) == (False, True, True)


def test_releasing_more_than_was_held_is_a_fault() -> None:
    with pytest.raises(RuntimeError):
        IntakeBudget(high=2, low=1).release(1)


def test_every_record_costs_something() -> None:
    assert estimate(None) > 0
    assert estimate(b"x" * 4_000) == estimate(b"") + 1_000
