"""A Sluice replica as a real process: started, killed, stopped, continued, terminated; its engine child can be killed alone."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

import psutil

from tests.servers.tied import tie

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 90.0


class ReplicaError(RuntimeError):
    """A replica did not do what it was asked; the message has the end of its log."""


@dataclass(slots=True, kw_only=True)
class Settings:
    """How replicas are started.

    `flags` are `sluice serve`'s own; `mutant` is planted first (planted.py), "" for none. `static_members`: slots with an even number
    have a name in the group that stays.
    """

    flags: tuple[str, ...]
    directory: Path
    mutant: str = ""
    static_members: bool = True
    environment: dict[str, str] = field(default_factory=dict)


class Replica:
    """One slot: a process at a time, with a number that stays over restarts."""

    def __init__(self, number: int, settings: Settings) -> None:
        self.number = number
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self._starts = 0
        self.is_paused = False
        self.grpc = self.admin = ""

    @property
    def alive(self) -> bool:
        """Whether its process runs (a stopped one does)."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """Of the running process. Raises `ReplicaError` when there is none."""
        if self._process is None:
            raise ReplicaError(f"replica {self.number} was never started")
        return self._process.pid

    @property
    def log(self) -> Path:
        """Standard error of every process of this slot."""
        return self._settings.directory / f"replica-{self.number}.log"

    async def start(self) -> None:
        """Returns once it says that it serves. Raises `ReplicaError`."""
        self._starts += 1
        with self.log.open("ab") as log:
            log.write(f"--- start {self._starts}\n".encode())
            log.flush()
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.chaos.planted",
                self._settings.mutant or "none",
                "serve",
                "--json",
                *self._settings.flags,
                *self._name(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self._settings.environment},
            )
        tie(self._process.pid)
        self.is_paused = False
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), START_TIMEOUT_S)
        except TimeoutError:
            line = b""
        if not line:
            raise ReplicaError(f"replica {self.number} did not start:\n{self.tail()}")
        facts = json.loads(line)
        self.grpc, self.admin = facts["grpc"], facts["admin"]

    def _name(self) -> tuple[str, ...]:
        is_static = self._settings.static_members and self.number % 2 == 0
        return ("--set", f'kafka.instance_id="replica-{self.number}"') if is_static else ()

    async def serving(self, within_s: float) -> bool:
        """Whether it serves the broker within this time."""
        until = asyncio.get_running_loop().time() + within_s
        while not await asyncio.to_thread(self._is_ready):
            if asyncio.get_running_loop().time() > until:
                return False
            await asyncio.sleep(0.2)
        return True

    def _is_ready(self) -> bool:
        try:
            with urlopen(f"http://{self.admin}/readyz", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def tail(self, num_bytes: int = 3_000) -> str:
        """The end of its log."""
        return self.log.read_bytes()[-num_bytes:].decode("utf-8", "replace")

    async def kill(self) -> None:
        """SIGKILL; returns once it has ended. Its child dies with it."""
        if self._process is not None:
            self._send(signal.SIGKILL)
            await self._process.wait()

    async def terminate(self) -> str:
        """SIGTERM, and waits for its end; what was wrong with that, or "". One that takes too long says where it stands and is killed."""
        if self._process is None or not self.alive:
            return ""
        if self.is_paused:
            self.go_on()
        self._send(signal.SIGTERM)
        try:
            code = await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            self._send(signal.SIGUSR1)
            await asyncio.sleep(1.0)
            await self.kill()
            return f"replica {self.number} did not end within {STOP_TIMEOUT_S:g} s of SIGTERM"
        return f"replica {self.number} ended with {code} after SIGTERM" if code else ""

    def pause(self) -> None:
        """SIGSTOP."""
        if self.alive:
            self.is_paused = True
            self._send(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        if self.alive:
            self._send(signal.SIGCONT)
        self.is_paused = False

    def kill_engine(self) -> bool:
        """SIGKILL to the engine child; False when there is none now."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.pid).children():
                if "engine.worker" in child.cmdline():
                    child.kill()
                    return True
        return False

    def _send(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)
