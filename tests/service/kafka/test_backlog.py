"""The age of the oldest unfinished prompt, whatever holds it back."""

from service.kafka.backlog import Backlog
from service.kafka.records import TopicPartition

P = TopicPartition("t.prompts", 0)


def seconds(backlog: Backlog, *, next_offset: int, end: int, now_ms: int) -> float:
    return backlog.seconds(P, next_offset=next_offset, end=end, now_ms=now_ms)


def test_an_empty_partition_has_none() -> None:
    assert seconds(Backlog(), next_offset=5, end=5, now_ms=9_000) == 0.0


def test_the_oldest_that_runs_counts_until_it_has_ended() -> None:
    backlog = Backlog()
    backlog.took(P, 0, 1_000)
    backlog.took(P, 1, 4_000)
    assert seconds(backlog, next_offset=2, end=2, now_ms=9_000) == 8.0
    backlog.ended(P, 0)
    assert seconds(backlog, next_offset=2, end=2, now_ms=9_000) == 5.0
    backlog.ended(P, 1)
    assert seconds(backlog, next_offset=2, end=2, now_ms=9_000) == 0.0


def test_one_that_was_seen_and_may_not_be_taken_counts_by_its_own_time() -> None:
    backlog = Backlog()
    backlog.refused(P, 3, 2_000)
    assert seconds(backlog, next_offset=3, end=9, now_ms=9_000) == 7.0
    backlog.took(P, 3, 2_000)
    backlog.ended(P, 3)
    assert seconds(backlog, next_offset=9, end=9, now_ms=9_000) == 0.0


def test_what_was_never_fetched_counts_from_when_lag_was_first_seen() -> None:
    backlog = Backlog()
    assert seconds(backlog, next_offset=0, end=4, now_ms=5_000) == 0.0
    assert seconds(backlog, next_offset=0, end=8, now_ms=65_000) == 60.0


def test_a_lost_partition_is_forgotten() -> None:
    backlog = Backlog()
    backlog.took(P, 0, 1_000)
    backlog.forget(P)
    assert seconds(backlog, next_offset=1, end=1, now_ms=9_000) == 0.0
