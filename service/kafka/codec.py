"""A consumed record to a prompt, and terminal events to result records: the headers of the contract are known here.

Guarantees: `Envelope.of` never fails, so that even a record that cannot be read gets a result that its sender can find;
`read_prompt` ends in a checked `PromptRequest` or a `RequestError` naming the field, header names included.
CloudEvents in binary mode are read as they are: `ce_id` serves as the label where there is none, the content type and the
value are the event's own. Structured mode is another content type, and refused.
"""

import hashlib
from dataclasses import dataclass, replace
from datetime import datetime

from schemas.v1 import inference_pb2
from service import wire
from service.contract import PromptRequest, Source
from service.errors import RequestError
from service.kafka.records import (
    HEADER_CONTENT_TYPE,
    HEADER_CONVERSATION,
    HEADER_CORRELATION,
    HEADER_DEADLINE,
    HEADER_DUPLICATE_OF,
    HEADER_IDEMPOTENCY,
    HEADER_LABEL,
    HEADER_PROMPT_DIGEST,
    HEADER_REPLAY_OF,
    HEADER_REPLY_TO,
    HEADER_TENANT,
    HEADER_TTL,
    HEADER_TYPE,
    Headers,
    InRecord,
    OutRecord,
)
from service.wire_limits import MAX_LABEL_BYTES, UINT32_MAX, check_text, invalid

MAX_HEADER_BYTES = 1_024
_NS_PER_MS = 1_000_000
_CE_VERSION, _CE_ID = "ce_specversion", "ce_id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What a record says about itself outside its value. Unreadable parts are empty; `read_prompt` names them."""

    source: Source
    label: str = ""
    correlation_id: bytes | None = None
    replay_of: bytes | None = None
    idempotency_key: bytes | None = None
    prompt_digest: bytes = b""
    media_type: str = wire.JSON

    @classmethod
    def of(cls, record: InRecord) -> "Envelope":
        """Of any record whatever."""
        source = Source(topic=record.topic, partition=record.partition, offset=record.offset)
        headers = _last(record)
        correlation = headers.get(HEADER_CORRELATION)
        if correlation is not None and len(correlation) > MAX_HEADER_BYTES:
            correlation = None
        replay_of = headers.get(HEADER_REPLAY_OF)
        if replay_of is not None and len(replay_of) > MAX_HEADER_BYTES:
            replay_of = None
        key = headers.get(HEADER_IDEMPOTENCY)
        if not key or len(key) > MAX_HEADER_BYTES:
            key = None
        return cls(
            source=source,
            label=_label(headers),
            correlation_id=correlation,
            replay_of=replay_of,
            idempotency_key=key,
            prompt_digest=b"" if key is None else _digest(record.value or b""),
            media_type=_media_type(headers),
        )

    @property
    def request_id(self) -> str:
        return self.source.request_id


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPrompt:
    """A prompt with what its headers add. `deadline_wall_ns`: since the epoch, 0 for none."""

    prompt: PromptRequest
    tenant: str = ""
    conversation_id: str = ""
    deadline_wall_ns: int = 0


def read_prompt(record: InRecord, *, trust_tenant: bool = False) -> ReadPrompt:
    """The prompt of a record with a value. Raises `RequestError`.

    A time to live counts from the record's timestamp; of several deadlines the earliest holds. A seed that the caller left out is
    a function of where the record stands, so that a redelivery says the same again.
    """
    headers = _last(record)
    if _text(headers, HEADER_REPLY_TO):
        raise RequestError("reply_to_refused", "results go to the result topic only", field=f"headers.{HEADER_REPLY_TO}")
    if any(name.startswith("ce_") for name in headers) and _text(headers, _CE_VERSION) != "1.0":
        raise invalid(f"headers.{_CE_VERSION}", "must be 1.0 for a CloudEvent in binary mode")
    label = _text(headers, HEADER_LABEL) or _text(headers, _CE_ID)
    check_text(f"headers.{HEADER_LABEL}", label, MAX_LABEL_BYTES)
    if len(headers.get(HEADER_CORRELATION, b"")) > MAX_HEADER_BYTES:
        raise invalid(f"headers.{HEADER_CORRELATION}", f"is longer than {MAX_HEADER_BYTES} bytes")
    if len(headers.get(HEADER_IDEMPOTENCY, b"")) > MAX_HEADER_BYTES:
        raise invalid(f"headers.{HEADER_IDEMPOTENCY}", f"is longer than {MAX_HEADER_BYTES} bytes")
    prompt = wire.prompt_from_bytes(record.value or b"", _text(headers, HEADER_CONTENT_TYPE))
    if label and not prompt.label:
        prompt = replace(prompt, label=label)
    if prompt.sampling.seed is None:
        seed = derived_seed(Source(topic=record.topic, partition=record.partition, offset=record.offset))
        prompt = replace(prompt, sampling=replace(prompt.sampling, seed=seed))
    return ReadPrompt(
        prompt=prompt,
        tenant=_text(headers, HEADER_TENANT) if trust_tenant else "",
        conversation_id=_text(headers, HEADER_CONVERSATION),
        deadline_wall_ns=_deadline(headers, record.timestamp, prompt.ttl_ms),
    )


def derived_seed(source: Source) -> int:
    """A seed in [0, 2^63) that any owner derives equally for this record."""
    digest = hashlib.blake2b(source.request_id.encode(), digest_size=8, person=b"sluice.seed").digest()
    return int.from_bytes(digest, "little") >> 1


def result_record(
    topic: str, envelope: Envelope, result: inference_pb2.Result, trace_headers: Headers = (), *, duplicate_of: str = ""
) -> OutRecord:
    """The result as a record in the content type that the prompt came in, on the partition that it came from.

    A finished one carries the prompt's idempotency key, for later owners to know it by; a repeated one, `duplicate_of` which request.
    """
    headers: list[tuple[str, bytes]] = [(HEADER_TYPE, b"result"), (HEADER_CONTENT_TYPE, envelope.media_type.encode())]
    if result.label:
        headers.append((HEADER_LABEL, result.label.encode()))
    if envelope.correlation_id is not None:
        headers.append((HEADER_CORRELATION, envelope.correlation_id))
    if envelope.replay_of is not None:
        headers.append((HEADER_REPLAY_OF, envelope.replay_of))
    if duplicate_of:
        headers.append((HEADER_DUPLICATE_OF, duplicate_of.encode()))
    elif envelope.idempotency_key is not None and result.status == inference_pb2.Result.finished:
        headers += [(HEADER_IDEMPOTENCY, envelope.idempotency_key), (HEADER_PROMPT_DIGEST, envelope.prompt_digest)]
    return OutRecord(
        topic=topic,
        key=envelope.request_id.encode(),
        partition=envelope.source.partition,
        value=wire.to_bytes(result, envelope.media_type),
        headers=(*headers, *trace_headers),
    )


def without_logprobs(result: inference_pb2.Result) -> inference_pb2.Result:
    """The result with what may be dropped first when it is too large."""
    smaller = inference_pb2.Result()
    smaller.CopyFrom(result)
    for choice in smaller.choices:
        choice.ClearField("logprobs")
    return smaller


def too_large(result: inference_pb2.Result) -> tuple[inference_pb2.Result, RequestError]:
    """The failed result that stands for one that no record can hold: everything but the choices, whose text its chunks have."""
    error = RequestError("result_too_large", "the result is larger than a record may be; read its chunks")
    smaller = without_logprobs(result)
    smaller.ClearField("choices")
    smaller.status = inference_pb2.Result.failed
    smaller.error.CopyFrom(wire.error_to_proto(error))
    return smaller, error


def _digest(value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=16, person=b"sluice.prompt").hexdigest().encode()


def _last(record: InRecord) -> dict[str, bytes]:
    # The last of equal headers counts, as Kafka's own lastHeader has it; names are taken without case.
    return {name.lower(): value for name, value in record.headers if value is not None}


def _text(headers: dict[str, bytes], name: str) -> str:
    raw = headers.get(name, b"")
    if len(raw) > MAX_HEADER_BYTES:
        raise invalid(f"headers.{name}", f"is longer than {MAX_HEADER_BYTES} bytes")
    try:
        return raw.decode("utf-8", "strict").strip()
    except UnicodeDecodeError:
        raise invalid(f"headers.{name}", "is no valid UTF-8") from None


def _label(headers: dict[str, bytes]) -> str:
    raw = headers.get(HEADER_LABEL) or headers.get(_CE_ID, b"")
    if len(raw) > MAX_LABEL_BYTES:
        return ""
    return raw.decode("utf-8", "replace").strip()


def _media_type(headers: dict[str, bytes]) -> str:
    # Answers are said in the prompt's own content type; in JSON where that cannot be told.
    try:
        return wire.media_type(_text(headers, HEADER_CONTENT_TYPE))
    except RequestError:
        return wire.JSON


def _deadline(headers: dict[str, bytes], timestamp_ms: int, prompt_ttl_ms: int) -> int:
    candidates = []
    if given := _text(headers, HEADER_DEADLINE):
        candidates.append(_instant(given))
    ttl_ms = prompt_ttl_ms
    if given := _text(headers, HEADER_TTL):
        if not (given.isascii() and given.isdigit() and len(given) <= 10 and 0 < int(given) <= UINT32_MAX):
            raise invalid(f"headers.{HEADER_TTL}", f"must be a whole number of milliseconds in [1, {UINT32_MAX}]")
        ttl_ms = min(int(given), ttl_ms or UINT32_MAX)
    if ttl_ms and timestamp_ms > 0:
        candidates.append((timestamp_ms + ttl_ms) * _NS_PER_MS)
    return min(candidates, default=0)


def _instant(text: str) -> int:
    """Nanoseconds since the epoch of an RFC 3339 date and time."""
    field = f"headers.{HEADER_DEADLINE}"
    try:
        instant = datetime.fromisoformat(text)
        if instant.tzinfo is None:
            raise invalid(field, "needs a zone: RFC 3339, as 2026-01-31T12:00:00Z")
        seconds = instant.timestamp()
    except (ValueError, OverflowError):
        raise invalid(field, "is no RFC 3339 date and time, as 2026-01-31T12:00:00Z") from None
    if seconds <= 0:
        raise invalid(field, "lies before 1970")
    return int(seconds * 1_000) * _NS_PER_MS
