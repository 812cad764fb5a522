"""The checker itself: good histories are clean, and each rule fires on a history made to break it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos import made_history as made
from tests.chaos.checker import RULES, check
from tests.chaos.history import History
from tests.chaos.made_history import NUM_TOKENS


def broken(history: History, **options: bool) -> set[str]:
    """The rules that are broken."""
    return {rule for rule, count in check(history, **options).counts.items() if count}


def without(history: History, topic: str, offset: int) -> History:
    """The history without what this topic says about a prompt."""
    history.seen = [one for one in history.seen if not (one.topic == topic and one.key == made.name_of(offset))]
    return history


def test_a_good_history_is_clean() -> None:
    assert check(made.good()).violations == []


def test_a_history_is_the_same_after_it_was_saved(tmp_path: Path) -> None:
    history = made.good()
    history.save(tmp_path / "h.gz")
    assert History.load(tmp_path / "h.gz") == history


def lost() -> History:
    return without(made.good(), "results", 1)


def duplicate() -> History:
    history = made.good()
    history.seen += made.shown(made.result(6, 1))
    return history


def wrong_tokens() -> History:
    history = without(made.good(), "results", 1)
    history.seen += made.shown(made.result(0, 1, said=made.tokens(0)))
    return history


def too_few_tokens() -> History:
    history = without(without(made.good(), "results", 1), "chunks", 1)
    history.acknowledged[1] = made.asked(1, answers=())
    history.seen += [*made.shown(made.result(0, 1, said=made.tokens(1)[:3])), made.started(3, 1), made.chunk(4, 1, 0, 3)]
    return history


def failed_instead_of_answered() -> History:
    history = without(made.good(), "results", 1)
    history.seen += made.shown(made.result(0, 1, code="deadline_exceeded"))
    return history


def answered_instead_of_refused() -> History:
    history = without(without(made.good(), "results", 2), "dlq", 2)
    history.seen += [*made.shown(made.result(1, 2)), *made.stream(8, 2)]
    history.barriers = []
    return history


def answered_tombstone() -> History:
    history = made.good()
    history.seen += [*made.shown(made.result(6, 3)), *made.stream(8, 3)]
    return history


def unasked() -> History:
    history = made.good()
    history.seen += [*made.shown(made.result(6, 99)), *made.stream(8, 99)]
    return history


def no_dead_letter() -> History:
    history = without(made.good(), "dlq", 2)
    history.barriers = []
    return history


def two_dead_letters() -> History:
    history = made.good()
    history.seen += made.shown(made.letter(1, 2))
    return history


def done_without_a_record() -> History:
    history = made.good()
    history.barriers[0] = made.barrier(0, results_end=2, letters=1, bits=0b1111)
    return history


def record_without_done() -> History:
    history = made.good()
    history.barriers[0] = made.barrier(0, results_end=2, letters=1, bits=0b1100)
    return history


def dead_letter_apart_from_its_result() -> History:
    history = made.good()
    history.barriers[0] = made.barrier(0, results_end=2, letters=0, bits=0b1110)
    return history


def done_bits_dropped() -> History:
    history = made.good()
    history.committed[2] = made.commit(2, 0, 0, epoch=2)
    return history


def offset_went_back() -> History:
    history = made.good()
    history.committed += [made.commit(4, 2, epoch=2), made.commit(5, 4, epoch=2)]
    return history


def epoch_went_back() -> History:
    history = made.good()
    history.committed.append(made.commit(4, 4, epoch=1))
    return history


def never_finished() -> History:
    history = made.good()
    history.committed.pop()
    return history


def past_the_end() -> History:
    history = made.good()
    history.committed.append(made.commit(4, 5, epoch=2))
    return history


def aborted_visible() -> History:
    history = made.good()
    history.seen = [one for one in history.seen if not (one.view == "committed" and one.offset == 5 and one.topic == "results")]
    history.seen += made.shown(made.result(6, 0))
    return history


def missed_by_the_reader_along() -> History:
    history = made.good()
    history.seen = [one for one in history.seen if not (one.view == "concurrent" and one.key == made.name_of(1))]
    return history


def seen_differently() -> History:
    history = made.good()
    index = next(i for i, one in enumerate(history.seen) if one.view == "concurrent" and one.offset == 5)
    history.seen[index] = dataclasses.replace(history.seen[index], value={"request_id": made.name_of(0), "status": "finished"})
    return history


def token_repeated() -> History:
    history = without(made.good(), "chunks", 1)
    history.seen += [made.started(3, 1), made.chunk(4, 1, 0, 2), made.chunk(5, 1, 1, NUM_TOKENS)]
    return history


def token_missing() -> History:
    history = without(made.good(), "chunks", 1)
    history.seen += [made.started(3, 1), made.chunk(4, 1, 0, 2), made.chunk(5, 1, 3, NUM_TOKENS)]
    return history


def stream_not_to_the_end() -> History:
    history = made.good()
    history.seen = [one for one in history.seen if not (one.topic == "chunks" and one.offset == 5)]
    return history


def resumed_past_what_was_said() -> History:
    history = without(made.good(), "chunks", 0)
    history.seen += [
        *made.stream(0, 0)[:2],
        made.started(6, 0, epoch=2, attempt=2, resume_from=2),
        made.chunk(7, 0, 2, NUM_TOKENS, epoch=2, attempt=2),
    ]
    return history


def chunk_before_its_start() -> History:
    history = without(made.good(), "chunks", 1)
    history.seen += [made.chunk(4, 1, 0, 2, epoch=3), made.started(5, 1, epoch=3), made.chunk(6, 1, 0, NUM_TOKENS, epoch=3)]
    return history


def unreadable_metadata() -> History:
    history = made.good()
    history.committed.append(dataclasses.replace(history.committed[-1], position=4, metadata="sluice1 e=2 r=gA"))
    return history


SPOILT: list[tuple[Callable[[], History], str]] = [
    (lost, "lost"),
    (duplicate, "duplicate"),
    (wrong_tokens, "wrong"),
    (too_few_tokens, "wrong"),
    (failed_instead_of_answered, "wrong"),
    (answered_instead_of_refused, "wrong"),
    (answered_tombstone, "wrong"),
    (unasked, "unasked"),
    (no_dead_letter, "dead_letter"),
    (two_dead_letters, "dead_letter"),
    (done_without_a_record, "torn"),
    (record_without_done, "torn"),
    (dead_letter_apart_from_its_result, "torn"),
    (done_bits_dropped, "regressed"),
    (offset_went_back, "regressed"),
    (epoch_went_back, "regressed"),
    (never_finished, "unfinished"),
    (past_the_end, "unfinished"),
    (aborted_visible, "aborted_visible"),
    (missed_by_the_reader_along, "readers_differ"),
    (seen_differently, "readers_differ"),
    (token_repeated, "chunks"),
    (token_missing, "chunks"),
    (stream_not_to_the_end, "chunks"),
    (resumed_past_what_was_said, "chunks"),
    (chunk_before_its_start, "chunks"),
    (unreadable_metadata, "metadata"),
]


@pytest.mark.parametrize(("spoil", "rule"), SPOILT)
def test_a_spoilt_history_breaks_its_rule(spoil: Callable[[], History], rule: str) -> None:
    assert rule in broken(spoil())


def test_each_rule_has_a_history_that_breaks_it() -> None:
    assert {rule for _, rule in SPOILT} == set(RULES)


def test_a_zombies_late_chunks_do_no_harm() -> None:
    history = made.good()
    history.seen += [made.chunk(8, 0, 1, 3, epoch=1), made.started(9, 0, epoch=1)]
    assert broken(history) == set()


def test_a_resumed_stream_may_start_again_from_nothing() -> None:
    history = without(made.good(), "chunks", 0)
    history.seen += [
        *made.stream(0, 0)[:2],
        made.started(6, 0, epoch=2),
        made.chunk(7, 0, 0, NUM_TOKENS, epoch=2),
    ]
    assert broken(history) == set()


def test_at_least_once_may_repeat_a_terminal_record_and_lag_behind_it() -> None:
    history = duplicate()
    history.barriers[0] = made.barrier(0, results_end=2, letters=1, bits=0)
    assert broken(history, at_least_once=True) == set()


def test_at_least_once_may_lose_nothing() -> None:
    assert broken(lost(), at_least_once=True) >= {"lost"}


def test_at_least_once_may_not_be_done_without_a_record() -> None:
    assert broken(done_without_a_record(), at_least_once=True) == {"torn"}
