"""Cancel records, and the keys that submitted prompts get."""

import pytest

from schemas.v1 import events_pb2
from service.contract import PromptRequest
from service.kafka.control import cancel_record, read_cancel
from service.kafka.submission import affinity_key
from tests.service.kafka.fakes import FakeRecord


def test_a_cancel_record_is_read_back() -> None:
    written = cancel_record("t.control", "t.prompts-0-1", time_ns=5)
    record = FakeRecord(written.value, key=written.key, headers=written.headers)
    assert (read_cancel(record), written.key) == ("t.prompts-0-1", b"t.prompts-0-1")


@pytest.mark.parametrize(
    ("value", "headers", "request_id"),
    [
        (b'{"request_id": "a-0-1"}', (), "a-0-1"),
        (events_pb2.Cancel(request_id="a-0-1").SerializeToString(), (("content-type", b"application/x-protobuf"),), "a-0-1"),
        (b'{"request_id": "a-0-1"}', (("sluice-type", b"another"),), ""),
        (b'{"request_id": 1}', (), ""),
        (b"\xff", (), ""),
        (b"{", (), ""),
        (None, (), ""),
    ],
)
def test_other_programs_may_write_cancels_and_what_is_none_is_passed_by(value, headers, request_id) -> None:  # type: ignore[no-untyped-def]
    assert read_cancel(FakeRecord(value, headers=headers)) == request_id


def test_the_key_is_the_nearest_thing_to_a_shared_prefix() -> None:
    prompt = PromptRequest(text="a long beginning" * 100, label="label")
    assert [affinity_key(prompt, *given) for given in (("key", "conversation"), ("", "conversation"), ("", ""))] == [
        "key",
        "conversation",
        "label",
    ]
    unnamed = [PromptRequest(text="x" * 1_024 + end) for end in ("a", "b")] + [PromptRequest(text="y")]
    keys = [affinity_key(prompt, "", "") for prompt in unnamed]
    assert (keys[0] == keys[1], keys[0] == keys[2]) == (True, False)
    assert affinity_key(PromptRequest(messages=(("user", "hi"),)), "", "") != affinity_key(
        PromptRequest(token_ids=(1, 2)), "", ""
    )
