"""Dead letters: the original record with why it could not be served, for a person to look at and to replay.

Guarantees: the reason is a code and fixed words, never prompt text (that stands only in the original bytes); a dead letter
always fits: what is too large keeps its coordinates and a digest.
"""

import hashlib

from schemas.v1 import events_pb2
from service import wire
from service.errors import RequestError
from service.kafka.codec import Envelope
from service.kafka.records import HEADER_CONTENT_TYPE, HEADER_TYPE, Headers, InRecord, OutRecord

Stage = str
"""Where it failed: decode, validate, admit, generate or write."""


def dead_letter(
    topic: str,
    record: InRecord,
    error: RequestError,
    *,
    stage: Stage,
    attempts: int,
    time_ns: int,
    max_bytes: int,
    trace_headers: Headers = (),
) -> OutRecord:
    """The record for the dead-letter topic, in JSON, keyed as the original; at most `max_bytes` large."""
    envelope = Envelope.of(record)
    value = record.value or b""
    message = events_pb2.DeadLetter(
        request_id=envelope.request_id,
        source=wire.source_to_proto(envelope.source),
        error=wire.error_to_proto(error),
        stage=stage,
        attempts=attempts,
        original_key=record.key or b"",
        original_value=value,
        # The last of equal headers counts, here as where they are read.
        original_headers={name: content for name, content in record.headers if content is not None},
        original_value_sha256=hashlib.sha256(value).digest(),
        original_value_bytes=len(value),
        traceparent=dict(trace_headers).get("traceparent", b"").decode("ascii", "replace"),
        time=wire.timestamp(time_ns),
    )
    headers: Headers = (
        (HEADER_TYPE, b"dead-letter"),
        (HEADER_CONTENT_TYPE, wire.JSON.encode()),
        ("sluice-error-code", error.code.encode()),
        ("sluice-stage", stage.encode()),
        ("sluice-origin", envelope.request_id.encode()),
        *trace_headers,
    )
    key = record.key
    for too_much in ("original_value", "original_headers", "original_key"):
        letter = OutRecord(topic=topic, key=key, value=wire.to_bytes(message), headers=headers)
        if letter.num_bytes <= max_bytes:
            return letter
        message.ClearField(too_much)
        if too_much == "original_key":
            key = None
    return OutRecord(topic=topic, key=key, value=wire.to_bytes(message), headers=headers)
