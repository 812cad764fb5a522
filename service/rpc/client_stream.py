"""One stream of the client library over all its attempts: taken up again, here or on another replica, until its end.

Guarantees: each token once and in order (`StreamFold`); attempts without progress are bounded by the back-off, and all of them by the
call's time. What ends it is a `SluiceError`. Knows how to try again, not what to ask: `open_call` does.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc

from service.contract import Delta, Finished, Reset, Started
from service.rpc.client_errors import SluiceError, as_error, interrupted
from service.rpc.client_fold import ProtocolError, StreamFold

StreamItem = Started | Delta | Reset | Finished

_SETTLE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Waits between attempts: doubling from `first_s` to `most_s`, each drawn from its upper half; `attempts` without progress end it."""

    first_s: float = 0.1
    most_s: float = 5.0
    attempts: int = 10

    def wait_s(self, failures: int, draw: float) -> float:
        """Seconds before attempt `failures` + 1; `draw` in [0, 1)."""
        return float(min(self.most_s, self.first_s * 2 ** (failures - 1))) * (0.5 + draw / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempts:
    """How attempts are made. `failed` hears of each that did; `outlives` tells which ends of a call are not the stream's own."""

    backoff: Backoff
    sleep: Callable[[float], Awaitable[object]]
    draw: Callable[[], float]
    clock: Callable[[], float]
    failed: Callable[[], None] = lambda: None
    outlives: Callable[[grpc.aio.AioRpcError, StreamFold], bool] = lambda error, fold: interrupted(error)


class TokenStream:
    """An async iterator of `Started`, `Delta`s and, last, `Finished`. One reader. Raises `SluiceError`.

    A `Reset` comes only where a new owner of a durable request says other tokens than were given (see `service.contract`).
    """

    def __init__(
        self, attempts: Attempts, fold: StreamFold, open_call: Callable[[StreamFold, float | None], Any], timeout_s: float
    ) -> None:
        self._attempts = attempts
        self._fold = fold
        self._open_call = open_call
        self._call: Any = None
        self._failures = 0
        self._until = attempts.clock() + timeout_s if timeout_s else 0.0
        self._ended = False
        self.num_resumes = 0
        """How often the stream was taken up again."""

    @property
    def request_id(self) -> str:
        """The id that the service gave the present attempt; "" before it was accepted. What `cancel` takes."""
        return self._fold.request_id

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens received, one number a choice: what `attach` takes as `after_seq`."""
        return self._fold.counts

    def __aiter__(self) -> "TokenStream":
        return self

    async def __anext__(self) -> StreamItem:
        while not self._ended:
            try:
                if self._call is None:
                    self._call = self._open()
                message = await self._call.read()
                if message is grpc.aio.EOF:
                    # A stream that ends well has said so before; read() has raised for one that ends otherwise.
                    raise SluiceError("internal", "the stream ended without a result", retriable=True)
                item = self._fold.take(message)
            except ProtocolError as error:
                await self.aclose()
                raise SluiceError("internal", str(error)) from None
            except grpc.aio.AioRpcError as error:
                await self._again_or_raise(error)
                continue
            except SluiceError:
                await self.aclose()
                raise
            if item is None:
                continue
            self._failures = 0
            if isinstance(item, Finished):
                self._ended = True
                await self._settle()
            return item
        raise StopAsyncIteration

    async def _settle(self) -> None:
        """Takes the status that follows the result: a call that is left before it counts as cancelled on the service's side."""
        call, self._call = self._call, None
        with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                await call.read()

    def _open(self) -> Any:
        left = self._until - self._attempts.clock() if self._until else None
        if left is not None and left <= 0:
            raise SluiceError("deadline_exceeded", "the time for this call is over")
        return self._open_call(self._fold, left)

    async def _again_or_raise(self, error: grpc.aio.AioRpcError) -> None:
        self._call = None
        attempts, failure = self._attempts, as_error(error)
        self._failures += 1
        attempts.failed()
        if not attempts.outlives(error, self._fold) or self._failures >= attempts.backoff.attempts:
            self._ended = True
            raise failure from None
        wait_s = max(failure.retry_after_s, attempts.backoff.wait_s(self._failures, attempts.draw()))
        if self._until and attempts.clock() + wait_s >= self._until:
            self._ended = True
            raise failure from None
        self.num_resumes += 1
        await attempts.sleep(wait_s)

    async def aclose(self) -> None:
        """Leaves the stream; idempotent. A request of `stream` ends with it, one of `attach` goes on."""
        self._ended = True
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    async def __aenter__(self) -> "TokenStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
