"""The product's one list of error codes, and what each means on every surface.

The table is the source; the README shows it, and a test keeps both equal. A `RequestError` is what a caller is told: a code, fixed
words, the field at fault. It never holds prompt or completion text.
"""

from dataclasses import dataclass
from typing import Literal

Code = Literal[
    "invalid_json",
    "invalid_protobuf",
    "unknown_field",
    "invalid_field",
    "unsupported_content_type",
    "prompt_too_long",
    "too_many_tokens",
    "unknown_model",
    "unknown_request",
    "deadline_exceeded",
    "cancelled",
    "overloaded",
    "draining",
    "crash_loop",
    "numeric_error",
    "out_of_memory",
    "engine_failed",
    "broker_unavailable",
    "result_too_large",
    "reply_to_refused",
    "unauthenticated",
    "permission_denied",
    "quota_exceeded",
    "internal",
]


@dataclass(frozen=True, slots=True)
class CodeInfo:
    """`grpc`: a name of grpc.StatusCode. `http`: a status. `dead_letter`: a Kafka prompt that ends so also makes a dead letter."""

    retriable: bool
    grpc: str
    http: int
    dead_letter: bool
    meaning: str


CODES: dict[Code, CodeInfo] = {
    "invalid_json": CodeInfo(
        False, "INVALID_ARGUMENT", 400, True, "the value is no valid JSON object (syntax, UTF-8, duplicate key)"
    ),
    "invalid_protobuf": CodeInfo(False, "INVALID_ARGUMENT", 400, True, "the value does not parse as sluice.v1.Prompt"),
    "unknown_field": CodeInfo(False, "INVALID_ARGUMENT", 400, True, "a field that this version does not have"),
    "invalid_field": CodeInfo(False, "INVALID_ARGUMENT", 400, True, "a field is missing, of the wrong type or out of range"),
    "unsupported_content_type": CodeInfo(
        False, "INVALID_ARGUMENT", 415, True, "the content-type header is neither application/json nor application/x-protobuf"
    ),
    "prompt_too_long": CodeInfo(False, "INVALID_ARGUMENT", 400, True, "the prompt leaves no room for a token in the context"),
    "too_many_tokens": CodeInfo(False, "INVALID_ARGUMENT", 400, True, "prompt + max_tokens can never fit on this replica"),
    "unknown_model": CodeInfo(False, "NOT_FOUND", 404, True, "this replica does not serve the model that was named"),
    "unknown_request": CodeInfo(
        False,
        "NOT_FOUND",
        404,
        False,
        "no request has this id, or its records are gone: results are kept as long as their topic keeps them",
    ),
    "deadline_exceeded": CodeInfo(
        False, "DEADLINE_EXCEEDED", 504, False, "the deadline passed, or would have before it could start"
    ),
    "cancelled": CodeInfo(False, "CANCELLED", 499, False, "the caller ended it"),
    "overloaded": CodeInfo(
        True, "RESOURCE_EXHAUSTED", 429, False, "the intake is full; try again after the time that is named"
    ),
    "draining": CodeInfo(True, "UNAVAILABLE", 503, False, "this replica is stopping; another one will take it"),
    "crash_loop": CodeInfo(False, "INTERNAL", 500, True, "the engine ended each time that this prompt was started"),
    "numeric_error": CodeInfo(False, "INTERNAL", 500, True, "the model gave no finite number for this prompt"),
    "out_of_memory": CodeInfo(True, "RESOURCE_EXHAUSTED", 503, True, "the device had no memory for this request"),
    "engine_failed": CodeInfo(True, "UNAVAILABLE", 503, True, "the engine cannot be started or restarted"),
    "broker_unavailable": CodeInfo(
        True, "UNAVAILABLE", 503, False, "Kafka does not answer this replica; try again, here or elsewhere"
    ),
    "result_too_large": CodeInfo(
        False, "RESOURCE_EXHAUSTED", 413, True, "the result does not fit in a record; its chunks hold the text"
    ),
    "reply_to_refused": CodeInfo(False, "PERMISSION_DENIED", 403, True, "the reply topic is not among those allowed"),
    "unauthenticated": CodeInfo(False, "UNAUTHENTICATED", 401, False, "no valid credentials"),
    "permission_denied": CodeInfo(False, "PERMISSION_DENIED", 403, False, "these credentials may not do that"),
    "quota_exceeded": CodeInfo(True, "RESOURCE_EXHAUSTED", 429, False, "the tenant's share is used up for now"),
    "internal": CodeInfo(True, "INTERNAL", 500, True, "a fault of Sluice; the log has the trace id"),
}


class RequestError(Exception):
    """One request cannot be served; the service goes on.

    `retry_after_s` above 0 tells a retriable caller when to come back.
    """

    def __init__(self, code: Code, message: str, *, field: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.code: Code = code
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s

    @property
    def info(self) -> CodeInfo:
        return CODES[self.code]

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        return f"{self.code}: {where}{self.message}"


class SetupError(Exception):
    """The service or a command cannot start; `exit_code` is 2 for wrong usage or configuration, 3 for an unreachable dependency.

    The message says what to do next.
    """

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code
