"""Errors as gRPC shows them: a status code and a `google.rpc.Status` that says why, which field, when to come back, which trace.

Guarantees: only a `RequestError`'s fixed words and the trace id reach the client; each error carries ErrorInfo (reason = the code,
domain `sluice`, retriable) and, where it applies, BadRequest, RetryInfo and RequestInfo. `error_of` reads the same back.
"""

import math
from collections.abc import Iterable
from typing import Any, cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from service.errors import CODES, Code, RequestError

DOMAIN = "sluice"
DETAILS_KEY = "grpc-status-details-bin"

Metadata = tuple[tuple[str, str | bytes], ...]


def grpc_code(error: RequestError) -> grpc.StatusCode:
    """The status code that the table gives to the error's code."""
    return cast(grpc.StatusCode, getattr(grpc.StatusCode, error.info.grpc))


def trailers(error: RequestError, *, request_id: str = "", trace_id: str = "") -> Metadata:
    """Trailing metadata with the rich status of `error`."""
    details: list[AnyMessage] = []

    def add(message: Message) -> None:
        packed = AnyMessage()
        packed.Pack(message)
        details.append(packed)

    retriable = "true" if error.info.retriable else "false"
    add(error_details_pb2.ErrorInfo(reason=error.code, domain=DOMAIN, metadata={"retriable": retriable}))
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message, reason=error.code)
        add(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.info.retriable and error.retry_after_s > 0:
        fraction, whole = math.modf(error.retry_after_s)
        add(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=int(whole), nanos=int(fraction * 1e9))))
    if trace_id or request_id:
        add(error_details_pb2.RequestInfo(request_id=request_id, serving_data=trace_id))
    status = status_pb2.Status(code=grpc_code(error).value[0], message=str(error), details=details)
    return ((DETAILS_KEY, status.SerializeToString()),)


def error_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> tuple[RequestError, str] | None:
    """The error and trace id in trailing metadata; None where there is no rich status of Sluice's."""
    raw = next((value for key, value in metadata or () if key == DETAILS_KEY), None)
    if not isinstance(raw, bytes):
        return None
    status = status_pb2.Status()
    try:
        status.ParseFromString(raw)
    except DecodeError:
        return None
    info, bad, retry, request = (
        _unpack(status, kind)
        for kind in (
            error_details_pb2.ErrorInfo,
            error_details_pb2.BadRequest,
            error_details_pb2.RetryInfo,
            error_details_pb2.RequestInfo,
        )
    )
    if info is None or info.domain != DOMAIN or info.reason not in CODES:
        return None
    violations = list(bad.field_violations) if bad is not None else []
    delay = retry.retry_delay if retry is not None else Duration()
    error = RequestError(
        cast(Code, info.reason),
        violations[0].description if violations else status.message.removeprefix(f"{info.reason}: "),
        field=violations[0].field if violations else "",
        retry_after_s=delay.seconds + delay.nanos / 1e9,
    )
    return error, request.serving_data if request is not None else ""


def _unpack(status: status_pb2.Status, kind: type) -> Any:
    for detail in status.details:
        message = kind()
        if detail.Unpack(message):
            return message
    return None
