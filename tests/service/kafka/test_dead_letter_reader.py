"""A dead letter replays as the record that it was."""

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from google.protobuf import json_format

from schemas.v1 import events_pb2, inference_pb2
from service.errors import RequestError
from service.kafka.codec import Envelope, result_record
from service.kafka.dead_letter import dead_letter
from service.kafka.dead_letter_reader import Letter, ReplayError, replay_record
from tests.service.kafka.fakes import FakeRecord

VALUE = b'{"prompt": "a", "wrong": 1}'
HEADERS = (
    ("content-type", b"application/json"),
    ("sluice-label", b"order 7"),
    ("sluice-idempotency-key", b"k-1"),
    ("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ("sluice-deadline", b"2020-01-01T00:00:00Z"),
    ("binary", b"\xff\x00"),
)
ORIGINAL = FakeRecord(VALUE, offset=7, topic="t.prompts.batch", partition=3, key=b"\xffkey", headers=HEADERS)


def letter_of(record: FakeRecord, max_bytes: int = 100_000) -> Letter:
    error = RequestError("unknown_field", "no such field", field="wrong")
    written = dead_letter("t.dlq", record, error, stage="decode", attempts=1, time_ns=1, max_bytes=max_bytes)
    return Letter(partition=0, offset=0, message=json_format.Parse(written.value, events_pb2.DeadLetter()))


def original(value: bytes | None) -> Callable[[str, int, int], Awaitable[bytes | None]]:
    async def read(topic: str, partition: int, offset: int) -> bytes | None:
        assert (topic, partition, offset) == ("t.prompts.batch", 3, 7)
        return value

    return read


async def test_a_replay_keeps_place_key_value_and_identity() -> None:
    record = await replay_record(letter_of(ORIGINAL), original(None), keep_deadline=False)
    assert (record.topic, record.partition, record.key, record.value) == ("t.prompts.batch", 3, b"\xffkey", VALUE)
    kept = {name: value for name, value in HEADERS if name != "sluice-deadline"}
    assert dict(record.headers) == {**kept, "sluice-replay-of": b"t.prompts.batch-3-7"}


async def test_a_deadline_is_kept_on_demand() -> None:
    record = await replay_record(letter_of(ORIGINAL), original(None), keep_deadline=True)
    assert dict(record.headers)["sluice-deadline"] == b"2020-01-01T00:00:00Z"


async def test_a_replay_of_a_replay_names_the_last_one_alone() -> None:
    again = FakeRecord(VALUE, offset=9, headers=(*HEADERS, ("sluice-replay-of", b"t.prompts.batch-3-7")))
    record = await replay_record(letter_of(again), original(None), keep_deadline=False)
    assert [value for name, value in record.headers if name == "sluice-replay-of"] == [b"t.prompts-0-9"]


async def test_a_value_that_was_too_large_to_keep_comes_from_the_original_topic_or_not_at_all() -> None:
    large = b"x" * 5_000
    letter = letter_of(replace(ORIGINAL, value=large), max_bytes=3_000)
    assert not letter.is_whole
    assert (await replay_record(letter, original(large), keep_deadline=False)).value == large
    for other in (None, b"another record"):
        with pytest.raises(ReplayError, match=r"t\.prompts\.batch-3-7 is gone"):
            await replay_record(letter, original(other), keep_deadline=False)


def test_the_result_of_a_replay_says_of_what() -> None:
    envelope = Envelope.of(FakeRecord(b"{}", headers=[("sluice-replay-of", b"t.prompts-0-9")]))
    assert ("sluice-replay-of", b"t.prompts-0-9") in result_record("t.results", envelope, inference_pb2.Result()).headers
