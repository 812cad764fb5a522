"""Headers of a prompt record: what they add, what they refuse; and result records and dead letters."""

import base64
import hashlib
import json

import pytest

from schemas.v1 import inference_pb2
from service.contract import Source
from service.errors import RequestError
from service.kafka.codec import Envelope, derived_seed, read_prompt, result_record, too_large, without_logprobs
from service.kafka.dead_letter import dead_letter
from tests.service.kafka.fakes import FakeRecord

VALUE = b'{"prompt": "a"}'


def record(value: bytes = VALUE, **headers: bytes) -> FakeRecord:
    return FakeRecord(value, offset=7, headers=[(name.replace("_", "-"), content) for name, content in headers.items()])


@pytest.mark.parametrize(
    ("headers", "code", "field"),
    [
        ({"content-type": b"text/plain"}, "unsupported_content_type", "content-type"),
        ({"sluice-reply-to": b"x"}, "reply_to_refused", "headers.sluice-reply-to"),
        ({"sluice-ttl-ms": b"-1"}, "invalid_field", "headers.sluice-ttl-ms"),
        ({"sluice-ttl-ms": b"0"}, "invalid_field", "headers.sluice-ttl-ms"),
        ({"sluice-ttl-ms": b"9" * 11}, "invalid_field", "headers.sluice-ttl-ms"),
        ({"sluice-deadline": b"tomorrow"}, "invalid_field", "headers.sluice-deadline"),
        ({"sluice-deadline": b"2026-01-31T12:00:00"}, "invalid_field", "headers.sluice-deadline"),
        ({"sluice-deadline": b"0001-01-01T00:00:00+23:59"}, "invalid_field", "headers.sluice-deadline"),
        ({"sluice-label": b"\xff"}, "invalid_field", "headers.sluice-label"),
        ({"sluice-label": b"l" * 257}, "invalid_field", "headers.sluice-label"),
        ({"correlation-id": b"c" * 2_000}, "invalid_field", "headers.correlation-id"),
        ({"ce_id": b"1"}, "invalid_field", "headers.ce_specversion"),
        ({"ce_specversion": b"0.3"}, "invalid_field", "headers.ce_specversion"),
    ],
)
def test_a_header_that_cannot_be_served_is_refused_by_name(headers: dict[str, bytes], code: str, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_prompt(FakeRecord(VALUE, headers=list(headers.items())))
    assert (caught.value.code, caught.value.field) == (code, field)


def test_the_tenant_header_counts_only_where_it_is_trusted() -> None:
    given = record(sluice_tenant=b"acme")
    assert read_prompt(given).tenant == ""
    assert read_prompt(given, trust_tenant=True).tenant == "acme"


def test_a_time_to_live_counts_from_the_records_timestamp() -> None:
    assert read_prompt(record(sluice_ttl_ms=b"250")).deadline_wall_ns == (1_700_000_000_000 + 250) * 1_000_000


def test_the_earliest_of_several_deadlines_holds() -> None:
    given = record(b'{"prompt": "a", "ttl_ms": 100}', sluice_ttl_ms=b"250", sluice_deadline=b"2030-01-01T00:00:00Z")
    assert read_prompt(given).deadline_wall_ns == (1_700_000_000_000 + 100) * 1_000_000


def test_a_deadline_is_an_instant_whatever_its_zone() -> None:
    zulu, offset = (
        read_prompt(record(sluice_deadline=text)) for text in (b"2030-01-01T00:00:00.5Z", b"2030-01-01T02:00:00.5+02:00")
    )
    assert zulu.deadline_wall_ns == offset.deadline_wall_ns == 1_893_456_000_500_000_000


def test_the_label_of_the_prompt_comes_before_the_headers() -> None:
    assert read_prompt(record(sluice_label=b"header")).prompt.label == "header"
    assert read_prompt(record(b'{"prompt": "a", "label": "own"}', sluice_label=b"header")).prompt.label == "own"


def test_a_cloud_event_in_binary_mode_is_read() -> None:
    event = FakeRecord(VALUE, headers=[("ce_specversion", b"1.0"), ("ce_id", b"evt"), ("ce_type", b"t"), ("ce_source", b"s")])
    assert read_prompt(event).prompt.label == "evt"
    assert Envelope.of(event).label == "evt"


def test_the_last_of_equal_headers_counts() -> None:
    given = FakeRecord(VALUE, headers=[("sluice-label", b"first"), ("Sluice-Label", b"last")])
    assert read_prompt(given).prompt.label == "last"


def test_a_given_seed_stays_and_an_absent_one_depends_on_the_place_alone() -> None:
    assert read_prompt(record(b'{"prompt": "a", "sampling": {"seed": 3}}')).prompt.sampling.seed == 3
    drawn = read_prompt(record()).prompt.sampling.seed
    assert drawn == read_prompt(record()).prompt.sampling.seed == derived_seed(Source(topic="t.prompts", partition=0, offset=7))
    assert drawn != derived_seed(Source(topic="t.prompts", partition=0, offset=8))
    assert 0 <= drawn < 2**63


def test_an_envelope_is_read_from_any_record() -> None:
    envelope = Envelope.of(FakeRecord(b"\xff", headers=[("content-type", b"\xff"), ("sluice-label", b"\xffx"), ("x", b"")]))
    assert (envelope.media_type, envelope.label, envelope.request_id) == ("application/json", "\ufffdx", "t.prompts-0-0")


def test_a_result_goes_back_on_the_partition_and_in_the_type_of_its_prompt() -> None:
    given = FakeRecord(
        b"", partition=3, offset=1, headers=[("content-type", b"application/x-protobuf"), ("correlation-id", b"c")]
    )
    result = inference_pb2.Result(request_id="t.prompts-3-1", label="l")
    written = result_record("results", Envelope.of(given), result, (("traceparent", b"tp"),))
    assert (written.key, written.partition) == (b"t.prompts-3-1", 3)
    assert inference_pb2.Result.FromString(written.value) == result
    assert dict(written.headers) == {
        "sluice-type": b"result",
        "content-type": b"application/x-protobuf",
        "sluice-label": b"l",
        "correlation-id": b"c",
        "traceparent": b"tp",
    }


def test_a_result_shrinks_to_no_logprobs_and_then_to_a_code() -> None:
    choice = inference_pb2.Choice(text="said", logprobs=[inference_pb2.TokenLogprobs(token="said")])
    result = inference_pb2.Result(
        choices=[choice], usage=inference_pb2.Usage(completion_tokens=1), status=inference_pb2.Result.finished
    )
    assert without_logprobs(result).choices[0] == inference_pb2.Choice(text="said")
    shrunk, error = too_large(result)
    assert (len(shrunk.choices), shrunk.status, shrunk.error.code) == (0, inference_pb2.Result.failed, error.code)
    assert shrunk.usage.completion_tokens == 1
    assert len(result.choices[0].logprobs) == 1


def letter(given: FakeRecord, max_bytes: int = 10_000) -> tuple[dict[str, object], dict[str, bytes], int]:
    error = RequestError("invalid_field", "bad", field="sampling.n")
    written = dead_letter("dlq", given, error, stage="decode", attempts=2, time_ns=0, max_bytes=max_bytes)
    return json.loads(written.value), dict(written.headers), written.num_bytes


def test_a_dead_letter_keeps_the_original_and_says_why() -> None:
    given = FakeRecord(b"\xff\x00", offset=4, key=b"k", headers=[("h", b"\x01")])
    body, headers, _ = letter(given)
    assert base64.b64decode(str(body["original_value"])) == b"\xff\x00"
    assert body["original_headers"] == {"h": "AQ=="}
    assert body["source"] == {"topic": "t.prompts", "partition": 0, "offset": "4"}
    assert body["error"] == {"code": "invalid_field", "message": "bad", "field": "sampling.n", "retriable": False}
    assert (body["stage"], body["attempts"]) == ("decode", 2)
    assert (headers["sluice-error-code"], headers["sluice-origin"]) == (b"invalid_field", b"t.prompts-0-4")


def test_a_dead_letter_that_would_not_fit_keeps_coordinates_and_a_digest() -> None:
    value = b"v" * 50_000
    body, _, size = letter(FakeRecord(value, key=b"k" * 20_000, headers=[("h", b"h" * 20_000)]), max_bytes=2_000)
    assert size <= 2_000
    assert (body["original_value"], body["original_headers"], body["original_value_bytes"]) == ("", {}, "50000")
    assert base64.b64decode(str(body["original_value_sha256"])) == hashlib.sha256(value).digest()
