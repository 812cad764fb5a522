"""The worker's loop over a real socket pair, with a fake engine: a reader that does not read, and idleness."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from engine.config import EngineConfig
from engine.frames import Abort, Close, encode
from engine.output import StepOutput
from engine.stand_in import StandInEngine
from engine.worker import MAX_UNSENT_BYTES, Outbox, Worker

PATIENCE_S = 60.0


class EndlessEngine(StandInEngine):
    """Has work for as long as `busy`; counts steps, aborts and questions, and tells a waiting test of each."""

    def __init__(self, busy: bool) -> None:
        super().__init__(EngineConfig(kind="stand-in"))
        self.changed = threading.Condition()
        self.busy = busy
        self.num_steps = self.num_aborts = self.num_asked = 0

    @property
    def has_work(self) -> bool:
        self.num_asked += 1
        return self.busy

    def abort(self, request_id: str) -> None:
        with self.changed:
            self.num_aborts += 1
            self.changed.notify_all()

    def step(self) -> StepOutput:
        with self.changed:
            self.num_steps += 1
            self.changed.notify_all()
        return StepOutput(outputs=(), stats=self.stats())

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE_S)


@dataclass
class Rig:
    """A worker in a thread, and the parent's end of its socket."""

    engine: EndlessEngine
    outbox: Outbox
    parent: socket.socket
    thread: threading.Thread


def _start(busy: bool, frame_bytes: int) -> Rig:
    parent, ours = socket.socketpair()
    ours.setblocking(False)
    engine = EndlessEngine(busy)
    outbox = Outbox(ours)
    worker = Worker(engine, ours, outbox, lambda output: b"x" * frame_bytes)

    def serve() -> None:
        with ours, contextlib.suppress(ConnectionError):
            worker.run()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return Rig(engine, outbox, parent, thread)


@pytest.fixture
def busy() -> Iterator[Rig]:
    rig = _start(busy=True, frame_bytes=1 << 20)
    yield rig
    rig.parent.close()
    rig.thread.join(PATIENCE_S)


@pytest.fixture
def idle() -> Iterator[Rig]:
    rig = _start(busy=False, frame_bytes=1)
    yield rig
    rig.parent.close()
    rig.thread.join(PATIENCE_S)


def test_a_parent_that_does_not_read_holds_the_engine_at_a_bound_and_is_still_heard(busy: Rig) -> None:
    """Steps go on to the bound, then stop; frames from the parent are still read; reading sets it going again."""
    busy.engine.wait_for(lambda: busy.outbox.num_bytes + (1 << 20) >= MAX_UNSENT_BYTES)
    for count in range(1, 4):
        busy.parent.sendall(encode(Abort(request_id="x")))
        busy.engine.wait_for(lambda count=count: busy.engine.num_aborts == count)  # type: ignore[misc]
    held = busy.engine.num_steps
    assert held <= MAX_UNSENT_BYTES // (1 << 20) + 2
    assert busy.outbox.num_bytes <= MAX_UNSENT_BYTES + (1 << 20)
    left = 4 << 20
    while left:
        left -= len(busy.parent.recv(min(left, 1 << 20)))
    busy.engine.wait_for(lambda: busy.engine.num_steps > held)


def test_close_ends_a_loop_that_is_held(busy: Rig) -> None:
    """With unread bytes at the bound too."""
    busy.engine.wait_for(lambda: busy.outbox.num_bytes + (1 << 20) >= MAX_UNSENT_BYTES)
    busy.parent.sendall(encode(Close()))
    busy.thread.join(PATIENCE_S)
    assert not busy.thread.is_alive()


def test_an_idle_worker_wakes_for_frames_only(idle: Rig) -> None:
    """Ten frames, at most a few looks at the engine for each: it does not spin."""
    for count in range(1, 11):
        idle.parent.sendall(encode(Abort(request_id="x")))
        idle.engine.wait_for(lambda count=count: idle.engine.num_aborts == count)  # type: ignore[misc]
    assert idle.engine.num_asked <= 11
    assert idle.engine.num_steps == 0
