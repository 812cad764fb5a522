"""The waiting order."""

import pytest

from engine.scheduling.sequence import Sequence
from engine.scheduling.waiting import OrderedSequences
from tests.engine.scheduling.harness import request


def make(key: tuple[int, int]) -> Sequence:
    return Sequence(request(), 0, key[1], key, (), 0)


def test_order_is_the_keys_however_they_came() -> None:
    queue = OrderedSequences()
    for key in ((0, 3), (-1, 5), (0, 1)):
        queue.add(make(key))
    assert [sequence.key for sequence in queue.items] == [(-1, 5), (0, 1), (0, 3)]


def test_the_one_that_is_named_is_removed() -> None:
    queue, first, second = OrderedSequences(), make((0, 1)), make((0, 2))
    queue.add(first)
    queue.add(second)
    queue.remove(first)
    assert queue.items == [second]


def test_removing_what_is_not_there_is_an_error() -> None:
    queue = OrderedSequences()
    queue.add(make((0, 1)))
    with pytest.raises(RuntimeError, match="not in this queue"):
        queue.remove(make((0, 1)))
