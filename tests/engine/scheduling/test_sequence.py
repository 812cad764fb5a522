"""What ends a sequence."""

from engine.scheduling.sequence import Sequence
from tests.engine.scheduling.harness import request


def make(stops: tuple[int, ...] = (), said: tuple[int, ...] = (), **fields: object) -> Sequence:
    made = request("a", (20, 21), output_token_ids=(said,) if said else (), **fields)  # type: ignore[arg-type]
    return Sequence(made, 0, 0, (0, 0), stops, 0)


def test_it_goes_on_below_max_tokens() -> None:
    assert make(max_tokens=3).say([5, 6]) == (2, None)


def test_max_tokens_ends_it_with_length() -> None:
    assert make(max_tokens=2).say([5, 6]) == (2, "length")


def test_a_stop_token_ends_it_and_stands_last() -> None:
    sequence = make(stops=(9,))
    assert sequence.say([5, 9]) == (2, "stop")
    assert sequence.token_ids == [20, 21, 5, 9]


def test_tokens_after_a_stop_are_dropped() -> None:
    sequence = make(stops=(9,))
    assert sequence.say([9, 5, 6]) == (1, "stop")
    assert sequence.num_output_tokens == 1


def test_tokens_after_the_last_allowed_one_are_dropped() -> None:
    sequence = make(max_tokens=2)
    assert sequence.say([5, 6, 7, 8]) == (2, "length")
    assert sequence.num_output_tokens == 2


def test_a_stop_token_as_the_last_allowed_one_is_a_stop() -> None:
    assert make(stops=(9,), max_tokens=2).say([5, 9]) == (2, "stop")


def test_a_stop_token_counts_only_after_min_tokens() -> None:
    assert make(stops=(9,), min_tokens=2).say([9, 9, 9]) == (3, "stop")


def test_tokens_said_before_count_for_min_tokens() -> None:
    assert make(stops=(9,), min_tokens=2, said=(5, 6)).say([9]) == (1, "stop")


def test_tokens_said_before_count_for_max_tokens() -> None:
    assert make(max_tokens=3, said=(5, 6)).say([7]) == (1, "length")


def test_said_tokens_that_end_in_a_stop_token_end_it_at_once() -> None:
    assert make(stops=(9,), said=(5, 9)).ended_before() == "stop"


def test_a_said_stop_token_within_min_tokens_does_not_end_it() -> None:
    assert make(stops=(9,), said=(5, 9), min_tokens=2).ended_before() is None


def test_max_tokens_said_before_end_it_at_once() -> None:
    assert make(max_tokens=2, said=(5, 6)).ended_before() == "length"
