"""Reads a gRPC call: its bytes, metadata and deadline become a `PromptRequest` and a `Call`.

Guarantees: what does not parse or lies out of range is a `RequestError` that names the field or the metadata key. The deadline is
the nearest of the call's own, `ttl_ms` and the `sluice-ttl-ms` / `sluice-deadline` metadata; a detached stream keeps only the
latter three, since its call may end before it. A tenant is believed only where the configuration says that metadata is trusted.
"""

import dataclasses
from collections.abc import Iterable
from datetime import datetime
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from opentelemetry.context import Context

from schemas.v1 import inference_pb2
from service.contract import Call, PromptRequest
from service.errors import RequestError
from service.wire_limits import UINT32_MAX, check_text

MAX_HEADER_BYTES = 256

TENANT = "sluice-tenant"
LABEL = "sluice-label"
TTL_MS = "sluice-ttl-ms"
DEADLINE = "sluice-deadline"
CONVERSATION_ID = "sluice-conversation-id"
CORRELATION_ID = "correlation-id"
IDEMPOTENCY_KEY = "sluice-idempotency-key"
REQUEST_ID = "sluice-request-id"
TRACE_ID = "sluice-trace-id"

M = TypeVar("M", bound=Message)


def parse(kind: type[M], value: bytes) -> M:
    """The message in `value`. Raises `RequestError` (`invalid_protobuf`)."""
    message = kind()
    try:
        message.ParseFromString(value)
    except DecodeError:
        raise RequestError("invalid_protobuf", f"does not parse as {kind.DESCRIPTOR.full_name}") from None
    return message


def text_headers(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """The metadata keys that Sluice knows, the last of each. Raises `RequestError` naming a key whose value is too long."""
    known = (TENANT, LABEL, TTL_MS, DEADLINE, CONVERSATION_ID, CORRELATION_ID, IDEMPOTENCY_KEY)
    found = {key: value for key, value in metadata or () if key in known and isinstance(value, str)}
    for key, value in found.items():
        check_text(key, value, MAX_HEADER_BYTES)
    return found


def labelled(prompt: PromptRequest, headers: dict[str, str]) -> PromptRequest:
    """`prompt`, with the label of the metadata where it has none itself."""
    if prompt.label or LABEL not in headers:
        return prompt
    return dataclasses.replace(prompt, label=headers[LABEL])


def build(
    prompt: PromptRequest,
    headers: dict[str, str],
    *,
    request_id: str,
    parent: Context,
    remaining_s: float | None,
    trusted_tenant: bool,
    monotonic_ns: int,
    wall_ns: int,
    said: tuple[tuple[int, ...], ...] = (),
) -> Call:
    """The call. `remaining_s`: what is left of gRPC's own deadline, None without one. Raises `RequestError`."""
    limits = _limits_ns(prompt, headers, wall_ns)
    if remaining_s is not None:
        limits.append(remaining_s * 1e9)
    left_ns = int(min(limits)) if limits else 0
    if limits and left_ns <= 0:
        raise RequestError("deadline_exceeded", "the deadline passed before the request arrived")
    return Call(
        request_id=request_id,
        transport="grpc",
        parent=parent,
        tenant=headers.get(TENANT, "") if trusted_tenant else "",
        deadline_ns=monotonic_ns + left_ns if limits else 0,
        said=said,
        seed=prompt.sampling.seed if said else None,
    )


def record_headers(
    prompt: PromptRequest, headers: dict[str, str], *, trusted_tenant: bool, wall_ns: int
) -> tuple[tuple[str, bytes], ...]:
    """What goes on with a prompt record of these metadata. Raises `RequestError`, also for a deadline that has passed."""
    if min(_limits_ns(prompt, headers, wall_ns), default=1) <= 0:
        raise RequestError("deadline_exceeded", "the deadline passed before the request arrived")
    passed_on = [key for key in (TTL_MS, DEADLINE, CONVERSATION_ID, CORRELATION_ID, IDEMPOTENCY_KEY) if key in headers]
    if trusted_tenant and TENANT in headers:
        passed_on.append(TENANT)
    return tuple((key, headers[key].encode()) for key in passed_on)


def _limits_ns(prompt: PromptRequest, headers: dict[str, str], wall_ns: int) -> list[float]:
    limits: list[float] = []
    if prompt.ttl_ms:
        limits.append(prompt.ttl_ms * 1e6)
    if TTL_MS in headers:
        limits.append(_ttl_ms(headers[TTL_MS]) * 1e6)
    if DEADLINE in headers:
        limits.append(_deadline_ns(headers[DEADLINE]) - wall_ns)
    return limits


def continuation(request: inference_pb2.StreamRequest, prompt: PromptRequest) -> tuple[tuple[int, ...], ...]:
    """The tokens said before. Raises `RequestError` when they cannot be continued from."""
    said = tuple(tuple(item.ids) for item in request.output_token_ids)
    if not said:
        return ()
    if len(said) != (prompt.sampling.n or 1):
        raise RequestError("invalid_field", "must have one entry a choice (sampling.n)", field="output_token_ids")
    if prompt.sampling.seed is None:
        raise RequestError(
            "invalid_field", "must be the first attempt's seed when output_token_ids are given", field="sampling.seed"
        )
    return said


def _ttl_ms(value: str) -> int:
    if not (value.isascii() and value.isdigit() and 0 < int(value) <= UINT32_MAX):
        raise RequestError("invalid_field", "must be a whole number of milliseconds above 0", field=TTL_MS)
    return int(value)


def _deadline_ns(value: str) -> float:
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise RequestError("invalid_field", "must be an RFC 3339 time with its offset", field=DEADLINE) from None
    if moment.tzinfo is None:
        raise RequestError("invalid_field", "must name its offset (Z or +hh:mm)", field=DEADLINE)
    return moment.timestamp() * 1e9
