"""What a call of the client library ends with: a typed error from the service's rich status, or from gRPC's own."""

import grpc

from service.errors import CODES, RequestError
from service.rpc.status import error_of


class SluiceError(Exception):
    """A call failed. `code` is one of the product's error codes, or "unavailable" when no replica answered."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        field: str = "",
        retriable: bool = False,
        retry_after_s: float = 0.0,
        trace_id: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        self.retriable = retriable
        self.retry_after_s = retry_after_s
        self.trace_id = trace_id

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        return f"{self.code}: {where}{self.message}"


def as_error(error: grpc.aio.AioRpcError) -> SluiceError:
    """What the service said; failing that, what gRPC says."""
    rich = error_of(tuple(error.trailing_metadata() or ()))
    if rich is not None:
        cause, trace_id = rich
        return SluiceError(
            cause.code,
            cause.message,
            field=cause.field,
            retriable=cause.info.retriable,
            retry_after_s=cause.retry_after_s,
            trace_id=trace_id,
        )
    status = error.code()
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return SluiceError("deadline_exceeded", CODES["deadline_exceeded"].meaning)
    if status is grpc.StatusCode.CANCELLED:
        return SluiceError("cancelled", CODES["cancelled"].meaning)
    retriable = status is grpc.StatusCode.UNAVAILABLE
    return SluiceError(status.name.lower(), error.details() or "no reason given", retriable=retriable)


def interrupted(error: grpc.aio.AioRpcError) -> bool:
    """Whether the replica went away, so that another attempt can go on where this one stopped."""
    rich = error_of(tuple(error.trailing_metadata() or ()))
    if rich is not None:
        cause: RequestError = rich[0]
        return cause.info.retriable and error.code() is grpc.StatusCode.UNAVAILABLE
    # A server that is stopped hard cancels its calls: not ours, since a cancelled call of ours is not read any more.
    return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
