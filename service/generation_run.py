"""One accepted request from its submission to its terminal event.

Guarantee: exactly one `Finished` or `Failed`, as the last event, whatever happens; then the ticket is back, the inbox closed, the
engine told to stop if it still runs, the spans ended and the line logged. All state is this object's; `generation.py` makes it.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import structlog

from engine import FinishReason, TokenOutput
from service.admission import Ticket
from service.choices import Choice
from service.contract import Call, ChoiceResult, Failed, Finished, PromptRequest, Started, Timings, Usage
from service.engine_process import EngineClient
from service.errors import CODES, Code, RequestError
from service.generation_trace import GenerationTrace
from service.measured import Measured
from service.outbox import Outbox
from service.resolution import Resolved
from service.streams import Inbox, Signal
from service.telemetry import names
from service.telemetry.metrics import RequestMetrics
from service.telemetry.tracing import hashed

ABORT_GRACE_S = 2.0
"""An aborted request that the engine does not end by then (it hangs, or restarts) ends without the engine's last facts."""

_log = structlog.get_logger(__name__)
_logs_info = logging.getLogger(__name__).isEnabledFor
"""Asked before a line is put together."""

_SIGNAL_REASONS: dict[Code, FinishReason] = {"cancelled": "cancelled", "draining": "cancelled", "deadline_exceeded": "deadline"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What a run works with. `on_end` is called once, last."""

    engine: EngineClient
    inbox: Inbox
    ticket: Ticket
    trace: GenerationTrace
    metrics: RequestMetrics
    model: str
    on_end: Callable[[], None]
    clock: Callable[[], int] = time.monotonic_ns
    queue_depth: int = 0


class GenerationRun:
    """Turns one request's engine outputs into events. `choices` have replayed what was said before."""

    def __init__(
        self,
        prompt: PromptRequest,
        call: Call,
        resolved: Resolved,
        choices: tuple[Choice, ...],
        measured: Measured,
        context: RunContext,
    ) -> None:
        self.outbox = Outbox()
        self.request = resolved.request
        self._label = prompt.label
        self._call = call
        self._choices = choices
        self._measured = measured
        self._context = context
        self._in_engine = {choice.index for choice in choices if choice.finish_reason is None}
        self._error: RequestError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._grace: asyncio.TimerHandle | None = None

    def expire_at(self, deadline_ns: int) -> None:
        """Ends the request with `deadline_exceeded` at a monotonic stamp."""
        delay_s = max(0.0, (deadline_ns - self._context.clock()) / 1e9)
        self._timer = asyncio.get_running_loop().call_later(delay_s, self.signal, "deadline_exceeded")

    def signal(self, code: Code) -> None:
        """Ends the request with `code` at the next step; nothing after it has ended. The first code counts."""
        if not self.outbox.ended:
            self._context.inbox.put(Signal(code))

    def begin(self, resumed: tuple[Choice, ...]) -> None:
        """Puts `Started`, and the last deltas of choices that what was said before had ended already."""
        self.outbox.put(
            Started(
                request_id=self.request.request_id,
                model=self._context.model,
                seed=self.request.sampling.seed,
                prompt_tokens=len(self.request.prompt_token_ids),
                trace_id=self._context.trace.trace_id,
            )
        )
        for choice in resumed:
            self.outbox.put(choice.closing_delta())

    async def run(self) -> None:
        """To the terminal event. Never raises for what a request, the engine or the caller does."""
        whole = False
        try:
            while any(choice.finish_reason is None for choice in self._choices):
                for item in await self._context.inbox.take():
                    if isinstance(item, Signal):
                        await self._signalled(item.code)
                    else:
                        self._take(item)
            whole = True
        except asyncio.CancelledError:
            self._fail(RequestError("draining", "this replica stopped"))
            raise
        finally:
            if not whole:
                self._fail(RequestError("internal", "the service failed on this request"))
            self._end()
            if self._in_engine:
                await self._context.engine.abort(self.request.request_id)

    def _take(self, output: TokenOutput) -> None:
        if output.finish_reason is not None:
            self._in_engine.discard(output.choice)
        choice = self._choices[output.choice]
        if choice.finish_reason is not None:
            return
        if output.finish_reason == "error":
            self._error = self._error or _engine_error(output)
        if output.finish_reason == "cancelled" and self._error is not None:
            # The engine knows that it was told to stop, not why.
            output = replace(output, finish_reason=_SIGNAL_REASONS.get(self._error.code, "error"))
        delta = choice.take(output)
        self._measured.take(output, len(delta.token_ids), self._context.clock())
        if delta.finish_reason in ("cancelled", "deadline") and self._error is None:
            self._error = RequestError("cancelled", "the engine ended it")
        self.outbox.put(delta)

    async def _signalled(self, code: Code) -> None:
        if self._error is None:
            self._error = RequestError(code, CODES[code].meaning)
        if code == "engine_failed" or self._grace is not None:
            self._fail(self._error)
            return
        self._grace = asyncio.get_running_loop().call_later(ABORT_GRACE_S, self.signal, code)
        await self._context.engine.abort(self.request.request_id)

    def _fail(self, error: RequestError) -> None:
        """Ends every open choice here and now."""
        self._error = self._error or error
        reason = _SIGNAL_REASONS.get(self._error.code, "error")
        for choice in self._choices:
            if choice.finish_reason is None:
                self.outbox.put(choice.end(reason))

    def _end(self) -> None:
        for timer in (self._timer, self._grace):
            if timer is not None:
                timer.cancel()
        now_ns = self._context.clock()
        results = tuple(choice.result() for choice in self._choices)
        if all(result.finish_reason in ("stop", "length") for result in results):
            # It finished before a signal took effect.
            self._error = None
        usage = self._measured.usage(sum(len(result.token_ids) for result in results))
        timings = self._measured.timings(now_ns)
        trace = self._context.trace
        seed = self.request.sampling.seed
        code = None if self._error is None else self._error.code
        try:
            trace.ended(self._measured, results, usage, timings, code, now_ns, self._context.queue_depth)
            self._context.metrics.finished(
                model=self._context.model,
                transport=self._call.transport,
                usage=usage,
                num_new_tokens=self._measured.num_tokens,
                timings=timings,
                code=code,
                trace_id=trace.exemplar,
            )
            self._log_end(results, usage, timings, code or "ok")
        finally:
            self._context.ticket.release()
            self._context.on_end()
            if self._error is None:
                self.outbox.put(Finished(choices=results, usage=usage, timings=timings, seed=seed, trace_id=trace.trace_id))
            else:
                self.outbox.put(
                    Failed(
                        error=self._error,
                        choices=results,
                        usage=usage,
                        timings=timings,
                        seed=seed,
                        trace_id=trace.trace_id,
                    )
                )

    def _log_end(self, results: tuple[ChoiceResult, ...], usage: Usage, timings: Timings, code: str) -> None:
        if not _logs_info(logging.INFO):
            return
        _log.info(
            "request finished",
            span=self._context.trace.span,
            **{
                names.LOG_REQUEST_ID: self.request.request_id,
                names.LOG_LABEL: self._label,
                names.LOG_TENANT: hashed(self._call.tenant),
                names.LOG_TRANSPORT: self._call.transport,
                names.LOG_MODEL: self._context.model,
                names.LOG_CODE: code,
                names.LOG_PROMPT_TOKENS: usage.prompt_tokens,
                names.LOG_CACHED_PROMPT_TOKENS: usage.cached_prompt_tokens,
                names.LOG_COMPLETION_TOKENS: usage.completion_tokens,
                names.LOG_QUEUE_MS: round(timings.queue_ms, 3),
                names.LOG_TTFT_MS: round(timings.ttft_ms, 3),
                names.LOG_TPOT_MS: round(timings.tpot_ms, 3),
                names.LOG_TOTAL_MS: round(timings.total_ms, 3),
                names.LOG_FINISH_REASONS: [result.finish_reason for result in results],
            },
        )


def _engine_error(output: TokenOutput) -> RequestError:
    code = cast(Code, output.error_code)
    if code in CODES:
        return RequestError(code, output.error_message or CODES[code].meaning)
    return RequestError("internal", "the engine gave an error that is not in the list")
