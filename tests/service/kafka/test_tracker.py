"""Offsets done out of order: against a plain model, and through the commit's metadata."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.kafka.tracker import METADATA_LIMIT_BYTES, PartitionTracker, Progress, decode, encode


class TrackerMachine(RuleBasedStateMachine):
    """A tracker beside sets of offsets; restarts go through the metadata string."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = PartitionTracker(low=5, epoch=1, window=64)
        self.position = 5
        self.running: set[int] = set()
        self.done: set[int] = set()
        self.records: set[int] = set()

    @rule(hole=st.integers(0, 3))
    def take(self, hole: int) -> None:
        offset = self.position + hole
        if not self.tracker.fits(offset):
            return
        self.position = offset + 1
        self.records.add(offset)
        taken = self.tracker.take(offset)
        assert taken == (offset not in self.done and offset not in self.running)
        if taken:
            self.running.add(offset)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.running)))
        assert self.tracker.complete(offset)
        self.running.discard(offset)
        self.done.add(offset)

    @rule(offset=st.integers(0, 200))
    def complete_what_is_not_running(self, offset: int) -> None:
        if offset not in self.running:
            assert not self.tracker.complete(offset)

    @rule()
    def restart(self) -> None:
        low, metadata = self.tracker.commit_point()
        progress = decode(metadata)
        self.tracker = PartitionTracker(low=low, epoch=progress.epoch + 1, done=progress.done, window=64)
        self.running.clear()
        # The log is read again from the committed offset: the model re-reads the same records.
        for offset in sorted(record for record in self.records if record >= low):
            taken = self.tracker.take(offset)
            assert taken == (offset not in self.done)
            if taken:
                self.running.add(offset)
        self.position = self.tracker.next_offset if not self.records else max(max(self.records) + 1, low)

    @invariant()
    def low_is_right(self) -> None:
        pending = self.records - self.done
        assert self.tracker.low == (min(pending) if pending else self.position)
        assert self.tracker.low <= self.tracker.next_offset
        assert self.tracker.running == self.running
        assert len(self.tracker.commit_point()[1]) <= METADATA_LIMIT_BYTES


TestTracker = TrackerMachine.TestCase
TestTracker.settings = settings(max_examples=200, stateful_step_count=100, deadline=None)


@given(
    done=st.integers(0, 2**300) | st.builds(lambda a, b: ((1 << a) - 1) << b, st.integers(0, 8_000), st.integers(0, 8_000)),
    epoch=st.integers(0, 2**31),
    next_offset=st.integers(0, 2**62),
    chunk_low=st.integers(-1, 2**62),
    commits=st.integers(0, 2**40),
    result_low=st.integers(-1, 2**62),
)
def test_metadata_gives_back_what_it_was_made_of(
    done: int, epoch: int, next_offset: int, chunk_low: int, commits: int, result_low: int
) -> None:
    progress = Progress(
        epoch=epoch, next_offset=next_offset, done=done, chunk_low=chunk_low, commits=commits, result_low=result_low
    )
    assert decode(encode(progress)) == progress


@given(st.text(max_size=60) | st.text(alphabet="sluice1 ebrn=09AZ/+,", max_size=40).map("sluice1 ".__add__) | st.none())
def test_any_metadata_decodes(metadata: str | None) -> None:
    assert decode(metadata).done >= 0


@pytest.mark.parametrize(
    "metadata", [None, "", "other tool", "sluice2 e=4 b=AA", "sluice1 e=x", "sluice1 b=!", "sluice1 r=/////////38"]
)
def test_unknown_metadata_means_no_bits(metadata: str | None) -> None:
    assert decode(metadata) == Progress()


def test_words_of_a_later_version_are_passed_over() -> None:
    assert decode("sluice1 e=7 n=9 later=1 b=Ag") == Progress(epoch=7, next_offset=9, done=2)


@pytest.mark.parametrize("window", [8_192, 16_384])
def test_the_worst_window_fits_in_the_brokers_metadata(window: int) -> None:
    tracker = PartitionTracker(low=2**40, epoch=2**31, window=window)
    for offset in range(2**40, 2**40 + window):
        tracker.take(offset)
    assert tracker.full
    for offset in range(2**40 + 1, 2**40 + window, 2):
        tracker.complete(offset)
    low, metadata = tracker.commit_point()
    assert low == 2**40
    assert len(metadata) <= METADATA_LIMIT_BYTES


def test_long_runs_are_shorter_than_plain_bits() -> None:
    tracker = PartitionTracker(low=0, window=8_192)
    for offset in range(8_192):
        tracker.take(offset)
    for offset in range(1, 8_192):
        tracker.complete(offset)
    assert len(tracker.commit_point()[1]) < 60


def test_an_offset_given_back_is_handed_out_again() -> None:
    tracker = PartitionTracker(low=0)
    assert tracker.take(0)
    tracker.release(0)
    assert tracker.take(0)
    assert tracker.low == 0


def test_bits_of_an_earlier_owner_do_not_move_low_past_the_log() -> None:
    tracker = PartitionTracker(low=3, done=0b111)
    assert tracker.low == 3
    assert not tracker.take(3)
    assert tracker.low == 4


def test_a_gap_that_reaches_over_the_windows_end_fills_it_until_low_moves() -> None:
    tracker = PartitionTracker(low=0, window=16)
    tracker.take(0)
    assert not tracker.fits(40)
    tracker.skip_to(40)
    assert (tracker.full, tracker.low, tracker.next_offset) == (True, 0, 16)
    tracker.complete(0)
    assert (tracker.full, tracker.low) == (False, 16)
    assert tracker.fits(40)
    assert tracker.take(40)
    tracker.complete(40)
    assert tracker.low == 41


def test_skipping_to_an_offset_within_the_window_leaves_it_untaken() -> None:
    tracker = PartitionTracker(low=0, window=16)
    tracker.take(0)
    tracker.skip_to(3)
    tracker.complete(0)
    assert (tracker.low, tracker.next_offset) == (3, 3)
    assert tracker.take(3)


def test_a_commit_point_may_look_ahead_and_changes_nothing() -> None:
    tracker = PartitionTracker(low=5, epoch=2)
    for offset in range(5, 9):
        tracker.take(offset)
    before = tracker.commit_point()
    low, metadata = tracker.commit_point(5, 7)
    assert (low, decode(metadata).done) == (6, 0b10)
    assert tracker.commit_point() == before
    tracker.complete(5)
    tracker.complete(7)
    assert tracker.commit_point() == (low, metadata)


def test_chunks_of_an_unfinished_prompt_hold_chunk_low() -> None:
    tracker = PartitionTracker(low=0, chunk_end=100)
    assert decode(tracker.commit_point()[1]).chunk_low == 100
    tracker.take(0)
    tracker.chunks_written(120)
    tracker.take(1)
    tracker.chunks_written(140)
    lows = [decode(tracker.commit_point(*also)[1]).chunk_low for also in ((), (0,), (1,), (0, 1))]
    assert lows == [100, 120, 100, 140]


def test_chunks_of_an_earlier_owner_are_held_until_their_prompt_is_done() -> None:
    tracker = PartitionTracker(low=0, chunk_end=200)
    tracker.has_chunks(1, 50)
    tracker.take(0)
    tracker.complete(0)
    assert decode(tracker.commit_point()[1]).chunk_low == 50
    tracker.take(1)
    tracker.release(1)
    assert decode(tracker.commit_point()[1]).chunk_low == 50
    tracker.take(1)
    tracker.complete(1)
    assert decode(tracker.commit_point()[1]).chunk_low == 200
