"""What one request had said, from the records of the chunk topic: epochs, gaps, hand-overs, and when to give up."""

from schemas.v1 import events_pb2
from service import wire
from service.contract import Source
from service.kafka.chunk_records import MAX_STALLED_STARTS, MAX_STARTS, Said, chunk_record, offset_of, read_chunk_record
from tests.service.kafka.fakes import FakeRecord

SOURCE = Source(topic="t.prompts", partition=2, offset=9)


def started(epoch: int, *resume_from: int, attempt: int = 1, seed: int = 5) -> events_pb2.Started:
    return events_pb2.Started(epoch=epoch, attempt=attempt, resume_from=resume_from or (0,), seed=seed)


def chunk(epoch: int, seq: int, *token_ids: int, choice: int = 0) -> events_pb2.Chunk:
    return events_pb2.Chunk(epoch=epoch, seq=seq, token_ids=token_ids, choice=choice)


def handover(epoch: int) -> events_pb2.Handover:
    return events_pb2.Handover(epoch=epoch)


def said(*messages: events_pb2.Started | events_pb2.Chunk | events_pb2.Handover) -> Said:
    found = Said(first_offset=0)
    for message in messages:
        found.feed(message)
    return found


def test_an_attempt_that_was_cut_off_has_said_its_chunks() -> None:
    found = said(started(1), chunk(1, 0, 10), chunk(1, 1, 11, 12))
    assert (found.token_ids, found.seed, found.attempt, found.handed_over) == ([[10, 11, 12]], 5, 1, False)


def test_a_late_chunk_of_a_replaced_owner_is_ignored() -> None:
    found = said(started(1), chunk(1, 0, 10, 11), started(2, 2, attempt=2), chunk(1, 2, 99), chunk(2, 2, 12))
    assert (found.token_ids, found.attempt) == ([[10, 11, 12]], 2)


def test_a_new_owner_that_knew_less_drops_what_it_did_not_know() -> None:
    assert said(started(1), chunk(1, 0, 10, 11, 12), started(2, 1), chunk(2, 1, 20)).token_ids == [[10, 20]]


def test_a_late_start_of_a_replaced_owner_is_ignored() -> None:
    found = said(started(2), chunk(2, 0, 10), started(1), chunk(1, 0, 99))
    assert (found.epoch, found.token_ids) == (2, [[10]])


def test_nothing_after_a_gap_counts() -> None:
    assert said(started(1), chunk(1, 0, 10), chunk(1, 5, 15), chunk(1, 6, 16)).token_ids == [[10]]


def test_choices_are_kept_apart() -> None:
    assert said(started(1, 0, 0), chunk(1, 0, 10), chunk(1, 0, 20, choice=1), chunk(1, 0, 9, choice=7)).token_ids == [
        [10],
        [20],
    ]


def test_a_request_that_starts_without_a_word_is_given_up() -> None:
    starts = [started(epoch, attempt=epoch) for epoch in range(1, MAX_STALLED_STARTS + 1)]
    assert not said(*starts[:-1]).crash_loop
    assert said(*starts).crash_loop


def test_a_start_that_was_handed_over_does_not_count() -> None:
    assert not said(*(message for epoch in range(1, 20) for message in (started(epoch), handover(epoch)))).crash_loop


def test_a_mark_that_comes_after_the_next_start_counts_for_its_own() -> None:
    found = said(started(1), started(2), handover(1), started(3), handover(2))
    assert (found.crash_loop, found.handed_over) == (False, False)


def test_a_request_that_comes_on_is_given_up_later() -> None:
    records = [m for epoch in range(MAX_STARTS) for m in (started(epoch, epoch), chunk(epoch, epoch, epoch))]
    assert not said(*records[:-2]).crash_loop
    assert said(*records).crash_loop


def test_records_come_back_as_they_were_written_in_either_content_type() -> None:
    for message in (started(3, 4, 5), chunk(3, 4, 1, 2), handover(3)):
        for media_type in (wire.JSON, wire.PROTOBUF):
            written = chunk_record("t.chunks", SOURCE, message, media_type)
            read = read_chunk_record(FakeRecord(value=written.value, key=written.key, headers=written.headers))
            assert (read, written.partition, written.key) == (message, 2, b"t.prompts-2-9")


def test_what_is_no_chunk_record_is_passed_over() -> None:
    for value, kind in ((b"{", b"chunk"), (b"{}", b"other"), (None, b"chunk"), (b"\xff", b"started")):
        assert read_chunk_record(FakeRecord(value=value, headers=[("sluice-type", kind)])) is None


def test_a_key_names_the_offset_of_a_prompt_on_its_own_partition() -> None:
    keys = [b"t.prompts-2-9", b"t.prompts-1-9", b"t.prompts.batch-2-9", b"t.prompts-2-x", b"\xff", None]
    assert [offset_of(key, "t.prompts", 2) for key in keys] == [9, -1, -1, -1, -1, -1]
