"""One engine child: started by exec with one end of a socket pair, an environment without credentials, and its output in our log.

Knows bytes and the process; frames and restarts are `engine_process.py`'s.
"""

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

import engine
from engine import EngineConfig

READ_BYTES = 256 * 1024
WRITE_BUFFER_BYTES = 1024 * 1024
"""What may wait for a child that does not read; beyond it nothing more is written until it does."""

_MAX_LOG_LINE = 4096
_PASSED_ON = frozenset(
    {
        "PATH",
        "HOME",
        "LANG",
        "LC_ALL",
        "LC_CTYPE",
        "TZ",
        "TMPDIR",
        "LD_LIBRARY_PATH",
        "XDG_CACHE_HOME",
        "CC",
        "CXX",
        "SLUICE_CACHE",
    }
)
_PASSED_ON_PREFIXES = ("CUDA_", "NVIDIA_", "HIP_", "ROCR_", "OMP_", "MKL_", "KMP_", "GOMP_", "TRITON_", "TORCH_", "PYTORCH_")

_log = structlog.get_logger(__name__)


class Child(Protocol):
    """A running child, as the supervisor sees it."""

    async def read(self) -> bytes:
        """Bytes that it wrote; empty once it has closed its end."""
        ...

    async def write(self, data: bytes) -> None:
        """Hands bytes over; waits while more than the write buffer is unread. Bytes to a dead child are dropped."""
        ...

    async def wait(self) -> int:
        """Its exit status, negative for a signal."""
        ...

    def kill(self) -> None:
        """Ends it at once; idempotent."""
        ...

    async def close(self) -> None:
        """Gives back every descriptor and task, once it has ended; idempotent."""
        ...


Spawn = Callable[[EngineConfig], Awaitable[Child]]


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What of the service's environment a child gets: paths, locale, and the settings of its compute libraries. No credentials."""
    kept = {name: value for name, value in environment.items() if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)}
    # -P keeps the working directory out of the child's path, so the place that the engine was imported from is named. What the engine
    # imports may stand only where PYTHONPATH says, as it does for the service.
    path = [str(Path(engine.__file__).parent.parent), *filter(None, [environment.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


class ProcessChild:
    """`python -m engine.worker` behind one inherited socket pair. Make it with `spawn`."""

    def __init__(self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.pid = process.pid
        self._process = process
        self._reader = reader
        self._writer = writer
        self._logging = asyncio.create_task(self._log_output(), name=f"engine log {process.pid}")

    async def read(self) -> bytes:
        try:
            return await self._reader.read(READ_BYTES)
        except ConnectionError:
            return b""

    async def write(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except ConnectionError:
            # The reading side sees the same end, and acts on it.
            return

    async def wait(self) -> int:
        return await self._process.wait()

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()

    async def close(self) -> None:
        self._writer.close()
        await self._process.wait()
        # A grandchild that kept the pipe open must not keep us.
        await asyncio.wait({self._logging}, timeout=1.0)
        self._logging.cancel()

    async def _log_output(self) -> None:
        output = self._process.stdout
        if output is None:
            return
        rest = b""
        while data := await output.read(READ_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._log_line(line)
            rest = rest[:_MAX_LOG_LINE]
        self._log_line(rest)

    def _log_line(self, line: bytes) -> None:
        if line.strip():
            _log.warning("engine output", pid=self.pid, line=line[:_MAX_LOG_LINE].decode("utf-8", "replace"))


def spawner(extra_environment: Mapping[str, str] | None = None) -> Spawn:
    """Starts real children. `extra_environment` goes to the child as it is (fault tests of the stand-in)."""

    async def spawn(config: EngineConfig) -> Child:
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = ("-P", "-m", "engine.worker", "--fd", str(theirs.fileno()))
            starting = asyncio.ensure_future(
                asyncio.create_subprocess_exec(
                    sys.executable,
                    *arguments,
                    "--config",
                    msgspec.json.encode(config).decode(),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    env=child_environment(os.environ) | dict(extra_environment or {}),
                )
            )
            try:
                process = await asyncio.shield(starting)
                reader, writer = await asyncio.open_unix_connection(sock=ours, limit=READ_BYTES)
            except asyncio.CancelledError:
                # The child is there, or will be in a moment, and nobody else knows of it.
                (await starting).kill()
                ours.close()
                raise
        writer.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        return ProcessChild(process, reader, writer)

    return spawn
