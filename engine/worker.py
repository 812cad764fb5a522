"""The engine's child process: `python -m engine.worker --fd N --config JSON`; the one file of the engine with I/O.

Speaks engine/frames.py on the inherited socket `fd`: progress (STATS) while it loads, HELLO when it is ready, one OUTPUT a step
(empty ones too: the sign of life), FATAL before it ends for a reason of its own. Guarantees:
- It dies with its parent: PR_SET_PDEATHSIG, and end of file on the socket.
- Idle it sleeps in poll; with work it never waits for the reader (I10) until `MAX_UNSENT_BYTES` are unsent: then it stops
  stepping, goes on reading, and resumes once the parent reads.
- A request that `add` refuses is answered with one "error" output a choice; nothing else notices.
- SIGINT and SIGHUP are ignored (a terminal's reach the whole group, the parent decides); SIGTERM ends it at once.
Exit codes: 0 CLOSE or end of file · 1 the engine failed · 2 configuration or checkpoint refused · 4 bytes that are no frame.
"""

import argparse
import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import msgspec

from engine.config import EngineConfig
from engine.cores import usable_cores
from engine.errors import CheckpointError, ConfigError, EngineError, FrameError
from engine.frames import PROTOCOL_VERSION, Abort, Close, FrameDecoder, Hello, Payload, encode
from engine.library_pages import release_library_pages
from engine.openmp import pin_threads, prefer_short_spin
from engine.output import EngineFacts, EngineFailure, EngineProgress, StepOutput, StepStats, TokenOutput
from engine.request import Request

MAX_UNSENT_BYTES = 8 * 1024 * 1024
"""Output kept for a parent that does not read: minutes of tokens, well below what matters to the machine."""

EXIT_CLOSED, EXIT_FAILED, EXIT_REFUSED, EXIT_FRAMES = 0, 1, 2, 4
_PR_SET_PDEATHSIG = 1
_READ_BYTES = 1 << 18
_MAX_MESSAGE = 4096
_FAREWELL_S = 1.0
"""How long the last frame may take to reach a parent that is slow to read."""


class StepEngine(Protocol):
    """What the worker drives: `Engine` or `StandInEngine`."""

    @property
    def facts(self) -> EngineFacts: ...

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def step(self) -> StepOutput: ...

    def stats(self) -> StepStats: ...


class Outbox:
    """Bytes on their way to the parent, in order, over a non-blocking socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._chunks: deque[memoryview] = deque()
        self.num_bytes = 0

    def put(self, data: bytes) -> None:
        """Queues and sends what the socket takes now. Raises `ConnectionError` when the parent is gone."""
        self._chunks.append(memoryview(data))
        self.num_bytes += len(data)
        self.flush()

    def flush(self) -> None:
        """Sends what the socket takes now. Raises `ConnectionError` when the parent is gone."""
        while self._chunks:
            try:
                sent = self._connection.send(self._chunks[0])
            except BlockingIOError:
                return
            self.num_bytes -= sent
            if sent == len(self._chunks[0]):
                self._chunks.popleft()
            else:
                self._chunks[0] = self._chunks[0][sent:]

    def flush_within(self, timeout_s: float) -> None:
        """Sends everything, waiting for the reader `timeout_s` at most each time that the socket is full."""
        poll = select.poll()
        poll.register(self._connection, select.POLLOUT)
        self.flush()
        while self._chunks and poll.poll(int(timeout_s * 1000)):
            self.flush()


class Worker:
    """The loop: read what is there, step, write what fits. `encode_output` turns a step into bytes."""

    def __init__(
        self, engine: StepEngine, connection: socket.socket, outbox: Outbox, encode_output: Callable[[StepOutput], bytes]
    ) -> None:
        self._engine = engine
        self._connection = connection
        self._outbox = outbox
        self._encode = encode_output
        self._decoder = FrameDecoder()
        self._refused: list[TokenOutput] = []
        self._open = True

    def run(self) -> None:
        """Returns when the parent closes. Raises `FrameError` for bytes that are no frame, and what the engine's step raises."""
        poll = select.poll()
        while self._open:
            has_room = self._outbox.num_bytes < MAX_UNSENT_BYTES
            busy = has_room and (self._engine.has_work or bool(self._refused))
            poll.register(self._connection, select.POLLIN | (select.POLLOUT if self._outbox.num_bytes else 0))
            for _, event in poll.poll(0 if busy else None):
                if event & select.POLLOUT:
                    self._outbox.flush()
                if event & ~select.POLLOUT:
                    self._read()
            if self._open and busy:
                self._step()

    def _read(self) -> None:
        try:
            data = self._connection.recv(_READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._open = False
            return
        for payload in self._decoder.feed(data):
            self._handle(payload)

    def _handle(self, payload: Payload) -> None:
        match payload:
            case Request():
                try:
                    self._engine.add(payload)
                except EngineError as error:
                    self._refused += refusals(payload, error)
            case Abort():
                self._engine.abort(payload.request_id)
            case Close():
                self._open = False
            case _:
                raise FrameError(f"a {type(payload).__name__} frame is not for the child")

    def _step(self) -> None:
        refused, self._refused = tuple(self._refused), []
        if self._engine.has_work:
            output = self._engine.step()
            if refused:
                output = replace(output, outputs=refused + output.outputs)
        else:
            output = StepOutput(outputs=refused, stats=self._engine.stats())
        self._outbox.put(self._encode(output.packed()))


def refusals(request: Request, error: EngineError) -> list[TokenOutput]:
    """One "error" output for each choice that a refused request still had to end."""
    said = request.output_token_ids or ((),) * request.sampling.n
    return [
        TokenOutput(
            request_id=request.request_id,
            choice=choice,
            seq=len(said[choice]),
            token_ids=(),
            finish_reason="error",
            error_code=error.code,
            error_message=str(error),
        )
        for choice in range(request.sampling.n)
        if choice not in request.ended_choices
    ]


def log(event: str, **fields: object) -> None:
    """One JSON line on standard error; the parent stamps it."""
    print(json.dumps({"event": event, "logger": "engine.worker", **fields}), file=sys.stderr, flush=True)


def die_with_parent(connection: socket.socket) -> None:
    """SIGKILL when the parent dies; exits at once if it is gone already."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    try:
        gone = connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        gone = False
    if gone:
        sys.exit(EXIT_CLOSED)


def step_back(nice: int) -> None:
    """Gives the threads of this process, and those that they will begin, a nice value no lower than `nice`.

    A wish: a sandbox may refuse it, and a thread may have ended since it was listed.
    """
    for thread in map(int, os.listdir("/proc/self/task")):
        with suppress(OSError):
            if os.getpriority(os.PRIO_PROCESS, thread) < nice:
                os.setpriority(os.PRIO_PROCESS, thread, nice)


def build(config: EngineConfig, progress: Callable[[float, str], None]) -> tuple[StepEngine, Callable[[StepOutput], bytes]]:
    """The configured engine, and how its outputs become bytes. Raises the typed errors of loading."""
    if config.kind == "paged":
        from engine.engine import Engine

        return Engine(config, progress), encode
    from engine.stand_in import StandInEngine
    from engine.stand_in_fault import GARBAGE, VARIABLE, Fault

    fault = Fault.parse(os.environ.get(VARIABLE, ""))
    engine = StandInEngine(config, fault=fault)
    if fault is None:
        return engine, encode
    return engine, lambda output: GARBAGE if fault.spoils(output.stats.step) else encode(output)


def read_config(config_json: str) -> EngineConfig:
    """The configuration on the command line. Raises `ConfigError`."""
    try:
        return msgspec.json.decode(config_json, type=EngineConfig)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"--config does not decode: {error}", field="engine") from error


def failure_of(error: Exception) -> tuple[EngineFailure, int]:
    """What the parent is told, and the exit code."""
    message = str(error)[:_MAX_MESSAGE] if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"[:500]
    # What a checkpoint calls its tensors may hold half a surrogate pair, which no frame can, or be longer than a frame.
    message = message.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(error, EngineError):
        code = EXIT_REFUSED if isinstance(error, ConfigError | CheckpointError) else EXIT_FAILED
        code = EXIT_FRAMES if isinstance(error, FrameError) else code
        return EngineFailure(code=error.code, message=message, field=error.field, retriable=error.retriable), code
    return EngineFailure(code="engine_failed", message=message), EXIT_FAILED


def serve(connection: socket.socket, config_json: str) -> int:
    """Loads, says HELLO, runs; gives the exit code."""
    outbox = Outbox(connection)

    def progress(fraction: float, detail: str) -> None:
        outbox.put(encode(EngineProgress(phase="loading", fraction=min(max(fraction, 0.0), 1.0), detail=detail)))

    try:
        outbox.put(encode(EngineProgress(phase="starting", fraction=0.0)))
        config = read_config(config_json)
        if config.pin_threads:
            # Counted before: from the moment that OpenMP loads, this thread may use one core alone.
            config = replace(config, num_threads=config.num_threads or usable_cores())
            pin_threads()
        engine, encode_output = build(config, progress)
        gc.collect()
        gc.freeze()
        # Pages that loading and packing have left free go back to the system.
        ctypes.CDLL(None).malloc_trim(0)
        if engine.facts.device == "cpu":
            release_library_pages()
            step_back(config.nice)
        outbox.put(encode(Hello(protocol_version=PROTOCOL_VERSION, facts=engine.facts)))
        Worker(engine, connection, outbox, encode_output).run()
    except ConnectionError:
        return EXIT_CLOSED
    except Exception as error:  # noqa: BLE001 - the worker's supervised boundary
        failure, code = failure_of(error)
        where = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        log("engine failed", code=failure.code, error=failure.message, where=where[-6:])
        try:
            outbox.put(encode(failure))
            outbox.flush_within(_FAREWELL_S)
        except ConnectionError:
            return EXIT_CLOSED
        return code
    return EXIT_CLOSED


def main() -> int:
    """The process's whole life."""
    parser = argparse.ArgumentParser(prog="engine.worker")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--config", required=True)
    arguments = parser.parse_args()
    prefer_short_spin()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Whatever a library prints goes where logs go.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    connection = socket.socket(fileno=arguments.fd)
    connection.setblocking(False)
    die_with_parent(connection)
    return serve(connection, arguments.config)


if __name__ == "__main__":
    sys.exit(main())
