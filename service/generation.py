"""The one use case: a prompt in, events out. Kafka, gRPC and HTTP all call this and nothing below it.

`Generation.start` refuses with a `RequestError` or accepts; an accepted request gives `Started`, deltas, and exactly one `Finished`
or `Failed`, whatever dies. A caller that goes away ends its request. A request's trace context is a local value here. Everything
measured is from the call of `start` on. Stop strings are found here: the engine's aborts are per request, so where one of several
choices stops, its later tokens are dropped, and the engine is told once every choice has ended.
"""

import asyncio
import secrets
import time
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from types import TracebackType

import structlog

from engine import EngineFacts
from service.admission import MIN_RETRY_S, Admission, Ticket
from service.choices import Choice, EndRules
from service.contract import Call, Event, PromptRequest
from service.engine_process import EngineClient
from service.errors import CODES, Code, RequestError
from service.generation_run import GenerationRun, RunContext
from service.generation_trace import GenerationTrace
from service.measured import Measured
from service.resolution import Limits, Resolved, check_model, encode_prompt, resolve
from service.streams import Streams
from service.telemetry import names
from service.telemetry.metrics import RequestMetrics
from service.telemetry.tracing import Tracing
from service.tokenization import Tokenization

_log = structlog.get_logger(__name__)


def new_request_id(wall_ns: Callable[[], int] = time.time_ns, random_bits: Callable[[int], int] = secrets.randbits) -> str:
    """A UUIDv7 (RFC 9562, 5.7) for a direct call: milliseconds first, so that ids sort by time."""
    value = (wall_ns() // 1_000_000 & (1 << 48) - 1) << 80
    value |= 0x7 << 76 | random_bits(12) << 64 | 0b10 << 62 | random_bits(62)
    digits = f"{value:032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def draw_seed() -> int:
    """A seed for a request that named none."""
    return secrets.randbits(63)


class GenerationStream:
    """The events of one accepted request, for one reader.

    Slow readers lose nothing: deltas that were not read yet are merged. Leaving it (`aclose`, the end of `async with`, or
    dropping the last reference) before the terminal event ends the request with `cancelled`.
    """

    def __init__(self, run: GenerationRun) -> None:
        self._run = run
        self.request_id = run.request.request_id
        self.seed = run.request.sampling.seed
        self._abandon = weakref.finalize(self, run.signal, "cancelled")
        self._abandon.atexit = False

    def cancel(self, code: Code = "cancelled") -> None:
        """Ends the request at the next step; its terminal event is still to be read. Idempotent; the first code counts."""
        self._run.signal(code)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        event = await self._run.outbox.take()
        if event is None:
            raise StopAsyncIteration
        return event

    async def aclose(self) -> None:
        """Ends the request if it still runs. Idempotent."""
        self._abandon()

    async def __aenter__(self) -> "GenerationStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class Generation:
    """The use case over one engine. `engine` must be ready before `start` is called.

    `clock` counts CLOCK_MONOTONIC nanoseconds, the engine's stamps and the callers' deadlines alike.
    """

    def __init__(
        self,
        *,
        engine: EngineClient,
        streams: Streams,
        tokenization: Tokenization,
        admission: Admission,
        limits: Limits,
        tracing: Tracing,
        metrics: RequestMetrics,
        clock: Callable[[], int] = time.monotonic_ns,
        draw_seed: Callable[[], int] = draw_seed,
    ) -> None:
        self._engine = engine
        self._streams = streams
        self._tokenization = tokenization
        self._admission = admission
        self._limits = limits
        self._tracing = tracing
        self._metrics = metrics
        self._clock = clock
        self._draw_seed = draw_seed
        self._runs: dict[str, GenerationRun] = {}
        self._entering: dict[str, Code | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        metrics.admission(lambda: (admission.num_waiting, admission.num_requests, admission.num_tokens))

    @property
    def model(self) -> str:
        """The name that callers use."""
        return self._limits.model

    @property
    def num_running(self) -> int:
        return len(self._runs)

    def facts(self) -> EngineFacts:
        return self._engine.facts()

    async def start(self, prompt: PromptRequest, call: Call) -> GenerationStream:
        """Accepts a request, or raises `RequestError` with a code of the list and the field at fault.

        Waits only where `call.waits`, for room at admission. After it has returned, one terminal event will come.
        """
        arrived_ns = self._clock()
        trace = GenerationTrace(self._tracing, self._limits.model, prompt, call, arrived_ns)
        depth = self._admission.num_requests + self._admission.num_waiting
        code: Code | None = "internal"
        try:
            run = await self._accept(prompt, call, trace, arrived_ns, depth)
            code = None
        except RequestError as error:
            code = error.code
            _log.info(
                "request refused",
                span=trace.span,
                field=error.field,
                **{
                    names.LOG_REQUEST_ID: call.request_id,
                    names.LOG_LABEL: prompt.label,
                    names.LOG_TRANSPORT: call.transport,
                    names.LOG_CODE: code,
                },
            )
            raise
        except asyncio.CancelledError:
            code = "cancelled"
            raise
        finally:
            if code is not None:
                trace.refused(code, self._clock(), depth)
                self._metrics.refused(transport=call.transport, code=code)
        return GenerationStream(run)

    def cancel(self, request_id: str, code: Code = "cancelled") -> bool:
        """Ends a running or waiting request; False when there is none of that id (any more). Idempotent."""
        run = self._runs.get(request_id)
        if run is not None:
            run.signal(code)
        elif request_id in self._entering:
            self._entering[request_id] = code
            self._admission.cancel(request_id, code)
        return run is not None or request_id in self._entering

    async def drain(self, grace_s: float) -> None:
        """Refuses new requests with `draining`, lets running ones finish for `grace_s`, then ends them with `draining`."""
        self._admission.drain()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for run in list(self._runs.values()):
            run.signal("draining")
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _accept(
        self, prompt: PromptRequest, call: Call, trace: GenerationTrace, arrived_ns: int, depth: int
    ) -> GenerationRun:
        if self._admission.draining:
            raise RequestError("draining", "this replica is stopping")
        if call.request_id in self._runs or call.request_id in self._entering:
            raise _still_ending()
        self._entering[call.request_id] = None
        try:
            check_model(prompt.model, self._limits)
            deadline_ns = _deadline(prompt, call, arrived_ns)
            if deadline_ns and deadline_ns <= arrived_ns:
                raise RequestError("deadline_exceeded", "the deadline had passed when it came")
            facts = self._engine.facts()
            ids = await encode_prompt(prompt, self._tokenization, facts, self._limits)
            self._check_entering(call.request_id)
            resolved = resolve(prompt, call, ids, self._tokenization, facts, self._limits, self._draw_seed)
            choices = self._choices(resolved, call, facts)
            trace.accepted(resolved.request.sampling, len(ids), sum(len(said) for said in call.said))
            ticket = await self._admission.enter(
                call.request_id,
                call.tenant,
                resolved.cost_tokens,
                deadline_ns=deadline_ns,
                waits=call.waits,
                weight=call.weight,
            )
            try:
                self._check_entering(call.request_id)
                return await self._launch(prompt, call, resolved, choices, trace, ticket, arrived_ns, deadline_ns, depth)
            except BaseException:
                ticket.release()
                raise
        finally:
            del self._entering[call.request_id]

    def _check_entering(self, request_id: str) -> None:
        """Raises `RequestError` for a request that was cancelled before it entered."""
        if (code := self._entering[request_id]) is not None:
            raise RequestError(code, CODES[code].meaning)

    def _choices(self, resolved: Resolved, call: Call, facts: EngineFacts) -> tuple[Choice, ...]:
        sampling = resolved.request.sampling
        rules = EndRules(
            stop=resolved.stop,
            stop_token_ids=frozenset(sampling.stop_token_ids) | frozenset(() if sampling.ignore_eos else facts.eos_token_ids),
            min_tokens=sampling.min_tokens,
            max_tokens=sampling.max_tokens,
        )
        with_logprobs = sampling.logprobs is not None
        choices = tuple(Choice(i, self._tokenization, rules, with_logprobs=with_logprobs) for i in range(sampling.n))
        entries = call.said_logprobs or ((),) * len(choices)
        for choice, said, logprobs in zip(choices, call.said, entries, strict=False):
            choice.replay(said, logprobs)
        return choices

    async def _launch(
        self,
        prompt: PromptRequest,
        call: Call,
        resolved: Resolved,
        choices: tuple[Choice, ...],
        trace: GenerationTrace,
        ticket: Ticket,
        arrived_ns: int,
        deadline_ns: int,
        depth: int,
    ) -> GenerationRun:
        request_id = call.request_id
        ended = tuple(choice for choice in choices if choice.finish_reason is not None)
        context = RunContext(
            engine=self._engine,
            inbox=self._streams.open(request_id, eager=bool(resolved.stop)),
            ticket=ticket,
            trace=trace,
            metrics=self._metrics,
            model=self._limits.model,
            on_end=lambda: self._ended(request_id),
            clock=self._clock,
            queue_depth=depth,
        )
        measured = Measured(arrived_ns, len(resolved.request.prompt_token_ids))
        run = GenerationRun(prompt, call, resolved, choices, measured, context)
        try:
            if len(ended) < len(choices):
                request = resolved.request
                if ended:
                    request = replace(request, ended_choices=tuple(choice.index for choice in ended))
                await self._engine.submit(request)
        except ValueError as error:
            # The engine owes an aborted attempt's end for as long as it hangs: longer than that attempt was waited for.
            self._streams.close(request_id)
            raise _still_ending() from error
        except BaseException:
            self._streams.close(request_id)
            raise
        run.begin(ended)
        if deadline_ns:
            run.expire_at(deadline_ns)
        self._runs[request_id] = run
        task = asyncio.create_task(run.run(), name=f"generation {request_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return run

    def _ended(self, request_id: str) -> None:
        self._runs.pop(request_id, None)
        self._streams.close(request_id)


def _still_ending() -> RequestError:
    """For a record that comes again while its lost attempt is being ended: it is sound, and can start a moment later."""
    return RequestError("overloaded", "an earlier attempt of this request has not ended yet", retry_after_s=MIN_RETRY_S)


def _deadline(prompt: PromptRequest, call: Call, arrived_ns: int) -> int:
    """The earlier of the caller's deadline and its time to live; 0 for none."""
    stamps = [call.deadline_ns] if call.deadline_ns else []
    if prompt.ttl_ms:
        stamps.append(arrived_ns + prompt.ttl_ms * 1_000_000)
    return min(stamps, default=0)
