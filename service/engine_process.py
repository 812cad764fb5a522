"""Drives the engine child: the seam between the service and whatever generates, and the supervisor behind it.

With `admission.py` this is the asyncio scheduler of the pipeline: admission says who enters and when, this drives the engine.
`EngineProcess` outlives its child: it sees a death by end of file or exit status, a hang by step progress (work outstanding and no
frame), and starts the next child, which continues everything where it stopped. What is owed is kept in `engine_ledger.py`, the
process and its bytes in `engine_child.py`. Guarantee: every submitted request gets one finish reason a choice, in order, without a
repeated or missing token.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import structlog

from engine import EngineConfig, EngineError, EngineFacts, Request, StepOutput, StepStats, TokenOutput, frames
from engine.output import EngineFailure, EngineProgress
from service.cancellation import end_tasks
from service.config import EngineSection
from service.engine_child import Child, Spawn, spawner
from service.engine_ledger import EngineLedger
from service.errors import SetupError
from service.telemetry.logging import fault

_log = structlog.get_logger(__name__)

State = Literal["starting", "ready", "restarting", "failed", "closed"]

_CLOSE_TIMEOUT_S = 3.0
_DRAIN_TIMEOUT_S = 0.5
_SILENT_CHECKS = 8
_MAX_UNREAD_STEPS = 1024
_WRITE_BYTES = 65_536
"""Requests that enter together go to the child in one write, up to so much."""


class EngineClient(Protocol):
    """What the service asks of an engine. Implemented by `EngineProcess`, and by fakes in tests."""

    async def start(self) -> None:
        """Returns once the engine is ready. Raises `SetupError` when it cannot be."""
        ...

    async def submit(self, request: Request) -> None:
        """Hands a request over; its outputs will come, ending in one finish reason a choice, whatever dies.

        Raises `ValueError` for an id whose end it still owes.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """Ends a request at the next step boundary; unknown ids are ignored."""
        ...

    def facts(self) -> EngineFacts:
        """What the ready engine is."""
        ...

    def outputs(self) -> AsyncIterator[StepOutput]:
        """Every step's outputs, in order, for one reader."""
        ...

    async def close(self) -> None:
        """Ends the engine; idempotent."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """Where the engine is, for health and metrics. `progress` while a child loads; `reason` of the last death, else empty."""

    state: State
    progress: EngineProgress | None = None
    deaths: int = 0
    restarts: int = 0
    reason: str = ""
    pid: int = 0

    @property
    def alive(self) -> bool:
        """False once there will be no engine any more."""
        return self.state not in ("failed", "closed")


@dataclass(frozen=True, slots=True)
class _Death:
    """How a child ended. `final`: the next one would end the same way."""

    reason: str
    final: bool = False


def backoff_s(restarts: int) -> float:
    """Seconds before the restart number `restarts` (from 1) of the current window: at once, then 0.2 s doubling up to 5 s."""
    return 0.0 if restarts <= 1 else min(5.0, 0.1 * 2.0 ** (restarts - 1))


_NO_STEP = StepStats(
    step=0,
    started_ns=0,
    ended_ns=0,
    num_prefill_tokens=0,
    num_decode_tokens=0,
    num_running=0,
    num_waiting=0,
    num_free_blocks=0,
    num_evictable_blocks=0,
    num_used_blocks=0,
    num_wasted_slots=0,
    num_preemptions=0,
    num_prefix_query_tokens=0,
    num_prefix_hit_tokens=0,
    schedule_ns=0,
    execute_ns=0,
)
"""Stands for the step of outputs that no engine said; `step` 0, which no engine counts."""


class EngineProcess:
    """An `EngineClient` over supervised children, started by exec.

    `on_status` is called in the event loop at every change; it must not block. `clock` counts seconds for the restart window.
    At most `section.max_restarts` restarts in `section.restart_window_s`; then everything outstanding, and whatever is submitted
    later, ends with `engine_failed`, and `status.alive` is False.
    """

    def __init__(
        self,
        config: EngineConfig,
        section: EngineSection,
        *,
        on_status: Callable[[EngineStatus], None] | None = None,
        spawn: Spawn | None = None,
        clock: Callable[[], float] = time.monotonic,
        backoff: Callable[[int], float] = backoff_s,
    ) -> None:
        # So many run and wait in the child. Given no more than these, and told to hold as many, it refuses nobody.
        most_inside = config.max_num_seqs + config.max_num_waiting
        self._config = replace(config, max_num_waiting=most_inside)
        self._section = section
        self._on_status = on_status
        self._spawn = spawn or spawner()
        self._clock = clock
        self._backoff = backoff
        self._ledger = EngineLedger(most_inside)
        self._aborts: deque[str] = deque()
        self._wake = asyncio.Event()
        # Steps wait for room in it before they count as said; ends, bounded by admission, do not.
        self._outputs: asyncio.Queue[StepOutput | None] = asyncio.Queue()
        self._room = asyncio.Event()
        self._status = EngineStatus(state="starting")
        self._facts: EngineFacts | None = None
        self._ready: asyncio.Future[None] | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._child: Child | None = None
        self._heard = False
        self._hello = asyncio.Event()
        self._closing = False

    @property
    def status(self) -> EngineStatus:
        return self._status

    @property
    def num_outstanding(self) -> int:
        """Requests whose last finish reason has not come yet."""
        return len(self._ledger)

    async def start(self) -> None:
        self._ready = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")
        try:
            await self._ready
        except BaseException:
            await self.close()
            raise

    async def submit(self, request: Request) -> None:
        """Raises `ValueError` for an id that is outstanding already."""
        self._ledger.add(request)
        if self._status.alive:
            self._wake.set()
        else:
            self._give_out(self._ledger.end_one(request.request_id, "engine_failed", "the engine is not running"))

    async def abort(self, request_id: str) -> None:
        tell_child, ends = self._ledger.abort(request_id)
        if tell_child:
            self._aborts.append(request_id)
            self._wake.set()
        self._give_out(ends)

    def facts(self) -> EngineFacts:
        """Raises `RuntimeError` before the first child was ready."""
        if self._facts is None:
            raise RuntimeError("the engine is not ready yet")
        return self._facts

    async def outputs(self) -> AsyncIterator[StepOutput]:
        while (output := await self._outputs.get()) is not None:
            self._room.set()
            yield output

    async def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        if self._child is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._child.write(frames.encode(frames.Close()))
                    await self._child.wait()
        if self._supervisor is not None:
            await end_tasks({self._supervisor})
        self._report("closed", progress=None)
        self._give_out(self._ledger.end_all("engine_failed", "the engine was stopped"))
        self._outputs.put_nowait(None)

    # The supervisor: one child after another.

    async def _supervise(self) -> None:
        try:
            await self._run_children()
        except Exception as error:
            # Nobody awaits this task for what it raises.
            _log.error("engine supervisor failed", **fault(error))
            raise
        finally:
            if self._status.alive and not self._closing:
                # A bug of this file: it must not leave anyone waiting.
                self._give_up(_Death("the supervisor failed"))

    async def _run_children(self) -> None:
        deaths: deque[float] = deque()
        while not self._closing:
            death = await self._run_child()
            if self._closing:
                return
            now = self._clock()
            deaths.append(now)
            while now - deaths[0] > self._section.restart_window_s:
                deaths.popleft()
            self._status = replace(self._status, deaths=self._status.deaths + 1, reason=death.reason)
            _log.error("engine died", reason=death.reason, outstanding=len(self._ledger), deaths=self._status.deaths)
            self._give_out(self._ledger.child_died())
            # A first start that fails twice will fail again: the caller learns it after one more try, not after five.
            never_ready = self._facts is None and len(deaths) > 1
            if death.final or never_ready or len(deaths) > self._section.max_restarts:
                self._give_up(death)
                return
            self._report("restarting", restarts=self._status.restarts + 1, progress=None)
            await asyncio.sleep(self._backoff(len(deaths)))

    def _give_up(self, death: _Death) -> None:
        self._report("failed", progress=None)
        _log.error("engine given up", reason=death.reason, deaths=self._status.deaths)
        self._give_out(self._ledger.end_all("engine_failed", "the engine cannot be restarted"))
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(SetupError(f"the engine cannot start: {death.reason}", exit_code=2 if death.final else 1))

    async def _run_child(self) -> _Death:
        """One child's life, from exec to the last byte that it wrote."""
        try:
            child = await self._spawn(self._config)
        except OSError as error:
            return _Death(f"the child cannot be started: {error.strerror}")
        self._child, self._heard = child, True
        self._hello.clear()
        self._aborts.clear()
        reading = asyncio.create_task(self._read(child), name="engine reader")
        writing = asyncio.create_task(self._write(child), name="engine writer")
        watching = asyncio.create_task(self._watch(), name="engine watchdog")
        exiting = asyncio.create_task(child.wait(), name="engine exit")
        tasks = {reading, writing, watching, exiting}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            hung = watching.result() if watching.done() else None
            if not exiting.done() and hung is None:
                # End of file comes a moment before the exit status, which says more.
                await asyncio.wait({exiting}, timeout=_DRAIN_TIMEOUT_S)
                if writing.done() and not exiting.done():
                    hung = _Death(f"its requests could not be written: {writing.exception()!r}")
            child.kill()
            # What it said before it died is still in the socket.
            await asyncio.wait({reading}, timeout=_DRAIN_TIMEOUT_S)
            said = reading.result() if reading.done() else None
            return hung or said or _Death(f"exit status {await exiting}")
        finally:
            child.kill()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            self._child = None
            await child.close()

    async def _read(self, child: Child) -> _Death | None:
        """Takes the child's frames until its end. Gives the reason when the child said one, or cannot be trusted any more."""
        decoder = frames.FrameDecoder()
        failure: _Death | None = None
        while data := await child.read():
            self._heard = True
            try:
                for payload in decoder.feed(data):
                    match payload:
                        case StepOutput():
                            await self._take_step(payload)
                        case frames.Hello():
                            self._child_ready(payload)
                        case EngineProgress():
                            self._report(self._status.state, progress=payload)
                        case EngineFailure():
                            # Messages about a setting begin with its name.
                            named = payload.message.startswith(payload.field)
                            where = "" if named else f"{payload.field}: "
                            loading = not self._hello.is_set()
                            failure = _Death(f"{where}{payload.message}", final=loading and not payload.retriable)
                        case _:
                            return _Death(f"it sent a {type(payload).__name__} frame")
            except EngineError as error:
                return failure or _Death(f"it sent what is no frame: {error.message}")
        return failure

    async def _take_step(self, step: StepOutput) -> None:
        while self._full:
            self._room.clear()
            await self._room.wait()
        # Between what counts as said and its reader nothing is awaited: a death in between would lose it.
        self._outputs.put_nowait(self._ledger.accept(step))
        if self._ledger.num_waiting:
            self._wake.set()

    def _child_ready(self, hello: frames.Hello) -> None:
        if hello.protocol_version != frames.PROTOCOL_VERSION:
            raise EngineError(f"protocol version {hello.protocol_version}, not {frames.PROTOCOL_VERSION}")
        self._facts = hello.facts
        self._hello.set()
        self._wake.set()
        self._report("ready", progress=None, pid=hello.facts.pid)
        _log.info("engine ready", pid=hello.facts.pid, load_s=round(hello.facts.load_s, 3), outstanding=len(self._ledger))
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    async def _write(self, child: Child) -> None:
        """Gives the child what may enter, and the aborts. `Child.write` bounds what it has not read yet."""
        await self._hello.wait()
        while True:
            await self._wake.wait()
            self._wake.clear()
            gathered = bytearray()
            for request in self._ledger.take():
                try:
                    gathered += frames.encode(request)
                except EngineError as error:
                    self._give_out(self._ledger.end_one(request.request_id, "prompt_too_long", error.message))
                    self._wake.set()
                if len(gathered) >= _WRITE_BYTES:
                    await child.write(bytes(gathered))
                    gathered.clear()
            while self._aborts:
                gathered += frames.encode(frames.Abort(request_id=self._aborts.popleft()))
            if gathered:
                await child.write(bytes(gathered))

    async def _watch(self) -> _Death:
        """Returns when the child is not ready in time, or has work and completes no step for `hang_timeout_s`.

        Silence is counted in whole intervals, so that a pause of this process is not taken for one of the child's.
        """
        try:
            async with asyncio.timeout(self._section.start_timeout_s):
                await self._hello.wait()
        except TimeoutError:
            return _Death(f"not ready within {self._section.start_timeout_s:g} s")
        silent = 0
        while silent < _SILENT_CHECKS:
            self._heard = False
            await asyncio.sleep(self._section.hang_timeout_s / _SILENT_CHECKS)
            # A full queue means that we do not read, not that it does not speak.
            idle = self._ledger.num_inside == 0 or self._full
            silent = 0 if self._heard or idle else silent + 1
        return _Death(f"hang: work outstanding and no step for {self._section.hang_timeout_s:g} s")

    @property
    def _full(self) -> bool:
        return self._outputs.qsize() >= _MAX_UNREAD_STEPS

    def _give_out(self, ends: tuple[TokenOutput, ...]) -> None:
        if ends:
            self._outputs.put_nowait(StepOutput(outputs=ends, stats=_NO_STEP))

    def _report(self, state: State, **changes: Any) -> None:
        self._status = replace(self._status, state=state, **changes)
        if self._on_status is not None:
            self._on_status(self._status)
