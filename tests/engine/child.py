"""A real engine child at the other end of a socket pair, and a parent that reads its frames."""

import json
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

from engine.config import EngineConfig
from engine.frames import FrameDecoder, Hello, Payload, encode
from engine.output import EngineProgress, StepOutput
from engine.request import Request
from tests.engine.driving import Listener

PATIENCE_S = 60.0
"""Bound of every wait: a loaded machine starts a child in seconds."""


def command(fd: int, config: EngineConfig | str) -> list[str]:
    """How a child is started."""
    text = config if isinstance(config, str) else json.dumps(asdict(config))
    return [sys.executable, "-m", "engine.worker", "--fd", str(fd), "--config", text]


class Wire:
    """The parent's end of the socket: frames out, frames in."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._decoder = FrameDecoder()
        self._payloads: deque[Payload] = deque()

    def receive(self) -> Payload | None:
        """The next frame; None at the end of the stream."""
        while not self._payloads:
            data = self.connection.recv(1 << 16)
            if not data:
                return None
            self._payloads.extend(self._decoder.feed(data))
        return self._payloads.popleft()

    def send(self, payload: Payload) -> None:
        self.connection.sendall(encode(payload))

    def hello(self) -> tuple[Hello, list[EngineProgress]]:
        """Waits until it is ready."""
        progress = []
        while True:
            match self.receive():
                case Hello() as hello:
                    return hello, progress
                case EngineProgress() as told:
                    progress.append(told)
                case other:
                    raise AssertionError(f"{other!r} before HELLO")

    def hear(self, listener: Listener, ends: int) -> list[StepOutput]:
        """Reads steps until `ends` choices have ended."""
        steps = []
        while sum(1 for said in listener.said.values() if said.reason) < ends:
            output = self.receive()
            if not isinstance(output, StepOutput):
                raise AssertionError(f"{output!r} instead of a step")
            steps.append(output)
            listener.hear(output.every())
        return steps

    def run(self, requests: list[Request]) -> Listener:
        """Adds all and hears them to their ends."""
        listener = Listener()
        for request in requests:
            self.send(request)
        self.hear(listener, sum(request.sampling.n for request in requests))
        return listener


class Child(Wire):
    """A child, started and not yet heard."""

    def __init__(self, config: EngineConfig | str, env: Mapping[str, str] | None = None) -> None:
        connection, theirs = socket.socketpair()
        connection.settimeout(PATIENCE_S)
        super().__init__(connection)
        with theirs:
            self.process = subprocess.Popen(
                command(theirs.fileno(), config),
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(PATIENCE_S)


@contextmanager
def child(config: EngineConfig | str, env: Mapping[str, str] | None = None) -> Iterator[Child]:
    """A child that is gone afterwards, whatever happens."""
    made = Child(config, env)
    try:
        yield made
    finally:
        made.connection.close()
        made.process.kill()
        made.process.communicate()
