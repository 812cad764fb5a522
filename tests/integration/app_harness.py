"""The whole service for tests: in this process as an `App`, or as the `sluice` command in a process of its own."""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
import termios
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil

from service.app import App
from service.config import Settings, load
from service.contract import Delta, Finished, PromptRequest, SamplingFields
from service.rpc.client import SluiceClient
from tests.integration.kafka_harness import Broker
from tests.servers.tied import tie

WAIT_S = 60.0
QUICK_KAFKA = {"heartbeat_interval_ms": 200, "session_timeout_ms": 6_000}

Values = dict[str, dict[str, Any]]


def values(model_dir: Path, *, broker: Broker | None = None, **sections: dict[str, Any]) -> Values:
    """Settings of a quick service: the stand-in engine, free ports, the broker's own topics (no Kafka without a broker)."""
    kafka: dict[str, Any] = {"enabled": False}
    if broker is not None:
        kafka = {
            "bootstrap_servers": broker.bootstrap,
            "group_id": broker.prefix + "group",
            "topic_prefix": broker.prefix,
            **QUICK_KAFKA,
        }
    base: Values = {
        "model": {"path": str(model_dir)},
        "engine": {"kind": "stand-in"},
        "kafka": kafka,
        "grpc": {"port": 0, "coalesce_ms": 0},
        "admin": {"port": 0, "drain_grace_s": 20.0},
    }
    return {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}


def settings(model_dir: Path, **options: Any) -> Settings:
    """`values` as checked settings."""
    return load(None, values(model_dir, **options))


@asynccontextmanager
async def app_of(config: Settings, **options: Any) -> AsyncIterator[App]:
    """A started service in this process, stopped at the end without waiting for what runs."""
    app = App(config, Path(config.model.path), **options)
    await app.start()
    try:
        yield app
    finally:
        await app.stop(grace_s=0.0)


class Sluice:
    """A `sluice` command that runs; `stdout` and `stderr` are read to the end by `finish`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.pid = process.pid
        self.facts: dict[str, Any] = {}
        self._errors: list[bytes] = []
        self._reading = asyncio.create_task(self._read_errors())

    async def _read_errors(self) -> None:
        if self.process.stderr is None:
            return
        while data := await self.process.stderr.read(65_536):
            self._errors.append(data)

    @property
    def errors(self) -> str:
        """What it wrote to standard error until now."""
        return b"".join(self._errors).decode("utf-8", "replace")

    async def announced(self) -> dict[str, Any]:
        """What `serve --json` says once it serves."""
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), WAIT_S)
        if not line:
            await asyncio.wait_for(self._reading, WAIT_S)
        assert line, f"it ended before it served:\n{self.errors}"
        self.facts = json.loads(line)
        return self.facts

    async def said(self, words: str) -> None:
        """Waits until standard error holds these words."""
        async with asyncio.timeout(WAIT_S):
            while words not in self.errors:  # noqa: ASYNC110 - what is waited for tells nobody
                await asyncio.sleep(0.02)

    async def child(self) -> psutil.Process:
        """The engine child, once there is one."""
        async with asyncio.timeout(WAIT_S):
            while True:
                for process in psutil.Process(self.pid).children():
                    with contextlib.suppress(psutil.Error):
                        if "engine.worker" in process.cmdline():
                            return process
                await asyncio.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ready(self) -> int:
        """The status of /readyz; 0 when nobody listens any more."""
        return await asyncio.to_thread(status_of, f"http://{self.facts['admin']}/readyz")

    async def finish(self) -> tuple[int, str]:
        """Exit status and the rest of standard output, when it has ended by itself."""
        async with asyncio.timeout(WAIT_S):
            rest = await self.process.stdout.read() if self.process.stdout is not None else b""
            code = await self.process.wait()
            await self._reading
        return code, rest.decode("utf-8", "replace")


@asynccontextmanager
async def command(
    *arguments: str,
    environment: dict[str, str] | None = None,
    terminal: int | None = None,
    ignoring: signal.Signals | None = None,
) -> AsyncIterator[Sluice]:
    """`sluice arguments` as a process; killed with its child at the end if it still runs.

    `terminal`: the descriptor of one that becomes its own, in place of pipes; `ignoring`: a signal that it inherits ignored.
    """

    def prepare() -> None:
        if terminal is not None:
            fcntl.ioctl(1, termios.TIOCSCTTY, 0)
        if ignoring is not None:
            signal.signal(ignoring, signal.SIG_IGN)

    streams = asyncio.subprocess.PIPE if terminal is None else terminal
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from service.cli.entry import main; main()",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=streams,
        stderr=streams,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **(environment or {})},
        start_new_session=terminal is not None,
        preexec_fn=prepare if terminal is not None or ignoring is not None else None,
    )
    tie(process.pid)
    sluice = Sluice(process)
    try:
        yield sluice
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await sluice.finish()


async def run(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command that ends by itself."""
    async with command(*arguments, environment=environment) as sluice:
        code, out = await sluice.finish()
        return code, out, sluice.errors


@asynccontextmanager
async def serve(config: Values, *, embedded: bool = False, ignoring: signal.Signals | None = None) -> AsyncIterator[Sluice]:
    """`sluice serve --json` that serves."""
    extra = ("--embedded",) if embedded else ()
    async with command("serve", "--json", *extra, *flags(config), ignoring=ignoring) as sluice:
        await sluice.announced()
        yield sluice


def flags(config: Values) -> list[str]:
    """`--set` for each value."""
    return [
        part
        for section, fields in config.items()
        for name, value in fields.items()
        for part in ("--set", f"{section}.{name}={json.dumps(value)}")
    ]


def status_of(url: str) -> int:
    """The HTTP status of GET `url`; 0 when nobody listens."""
    try:
        with urlopen(url, timeout=5) as response:
            return int(response.status)
    except HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return 0


async def gone(process: psutil.Process) -> None:
    """Waits until a process that is not ours has ended (reaped, or nobody's zombie)."""
    deadline = time.monotonic() + WAIT_S
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {process.pid} is still there"
        await asyncio.sleep(0.02)


def greedy(text: str, tokens: int, *, seed: int = 7) -> PromptRequest:
    """A prompt whose answer is the same each time."""
    return PromptRequest(text=text, sampling=SamplingFields(max_tokens=tokens, seed=seed, ignore_eos=True))


async def tokens_of(client: SluiceClient, prompt: PromptRequest, begun: asyncio.Event | None = None) -> list[int]:
    """The tokens of a stream as they came; `begun` is set with the first. The result must hold the same."""
    said: list[int] = []
    async with asyncio.timeout(WAIT_S), client.stream(prompt) as events:
        async for event in events:
            if isinstance(event, Delta):
                assert event.seq == len(said)
                said.extend(event.token_ids)
                if begun is not None:
                    begun.set()
            elif isinstance(event, Finished):
                assert list(event.choices[0].token_ids) == said
    return said
