"""The checker's decoder of commits, against what is written by hand and, as the two must agree on the form, by the service."""

from hypothesis import given
from hypothesis import strategies as st

from service.kafka.tracker import Progress, encode
from tests.chaos.progress import Done, done_of


@given(st.sets(st.integers(0, 400), max_size=200), st.integers(0, 50))
def test_what_the_service_encodes_is_what_the_checker_reads(done: set[int], epoch: int) -> None:
    bits = sum(1 << offset for offset in done)
    assert done_of(7, encode(Progress(epoch=epoch, next_offset=500, done=bits))) == Done(low=7, bits=bits, epoch=epoch)


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)), st.integers(0, 30), st.integers(0, 30))
def test_missing_offsets_are_those_done_before_and_not_after(first: set[int], second: set[int], low: int, later: int) -> None:
    before = Done(low=low, bits=sum(1 << bit for bit in first))
    after = Done(low=later, bits=sum(1 << bit for bit in second))
    assert before.missing_from(after) == [offset for offset in range(100) if offset in before and offset not in after]
