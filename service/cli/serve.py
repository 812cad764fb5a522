"""`sluice serve`: the service until it is told to stop."""

import asyncio
import contextlib
import gc
import os
import signal
import stat
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import uvloop
from rich.markup import escape

from service.app import App, Core, Endpoints
from service.cli import output
from service.cli.demo_model import ensure_demo_model
from service.cli.options import ConfigFile, Json, Overrides, Quantize, settings_from
from service.config import Settings
from service.errors import SetupError
from service.health import HealthReport
from service.telemetry import logging

T = TypeVar("T")

SECOND_SIGNAL_EXIT = 130


def serve(
    config: ConfigFile = None,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option("--model", help="A model directory (model.path).", show_default=False)] = None,
    quantize: Quantize = None,
    brokers: Annotated[
        str | None, typer.Option("--brokers", "-b", help="Comma-separated host:port.", show_default=False)
    ] = None,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="Bring an in-memory broker: for a first try, not durable.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Serve until SIGTERM, Ctrl-C or the end of the terminal, which drain; a second signal ends at once."""
    flags: dict[str, dict[str, Any]] = {
        "model": {"path": model},
        "engine": {"quantize": quantize},
        "kafka": {"bootstrap_servers": brokers, "embedded": embedded or None},
    }
    settings = settings_from(config, overrides, flags)
    logging.configure(settings.logging)
    model_dir = resolve_model(settings)
    uvloop.run(_serve(settings, model_dir, as_json))


def resolve_model(settings: Settings) -> Path:
    """The model directory that the settings name; without one the demo's, fetched first where it is missing."""
    if settings.model.path:
        directory = Path(settings.model.path).expanduser()
        if not (directory / "config.json").is_file():
            raise SetupError(
                f"model.path {directory} holds no config.json; name a Hugging Face directory, "
                "or make one with `sluice model import FILE.gguf DIR`"
            )
        return directory
    with output.progress("model") as tell:
        return ensure_demo_model(tell)


async def loading(core: Core, start: Callable[[], Awaitable[T]]) -> T:
    """Awaits `start` behind a bar that follows the engine's loading."""
    with output.progress("engine") as tell:

        def show(report: HealthReport) -> None:
            if report.state == "starting":
                tell(report.fraction, report.detail or report.phase)

        unwatch = core.health.watch(show)
        try:
            return await start()
        finally:
            unwatch()


async def _serve(settings: Settings, model_dir: Path, as_json: bool) -> None:
    stopping = asyncio.Event()
    _on_signals(stopping)
    app = App(settings, model_dir)
    starting = asyncio.create_task(loading(app.core, app.start))
    waiting = asyncio.create_task(stopping.wait())
    await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        output.err.print("stopped before it served")
        return
    try:
        endpoints = starting.result()
    finally:
        if starting.exception() is not None:
            waiting.cancel()
    # What starting made lives as long as the process: a collection that walked it all would hold every stream up.
    gc.collect()
    gc.freeze()
    # A prompt makes thousands of short-lived objects and no cycles to speak of: looked for less often, at a few megabytes.
    gc.set_threshold(20_000, 20, 20)
    try:
        _announce(app, endpoints, settings, as_json)
        await waiting
        output.err.print(f"draining (up to {settings.admin.drain_grace_s:g} s; once more ends at once) …")
    finally:
        # Also where nobody reads what is said any more (`2>&1 | head`), and saying it fails.
        clean = await app.stop()
    output.err.print("stopped" if clean else "stopped; what had not finished comes again from Kafka")


def _on_signals(stopping: asyncio.Event) -> None:
    def handle() -> None:
        if stopping.is_set():
            # The engine child dies with this process (PR_SET_PDEATHSIG, end of file); Kafka offsets are committed by tick.
            try:
                output.err.print("ended at once")
            finally:
                os._exit(SECOND_SIGNAL_EXIT)
        stopping.set()

    def hang_up() -> None:
        # The shell and the kernel both tell: a repeated one means nothing.
        _leave_terminal()
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle)
    # nohup asks to live on.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGHUP, hang_up)


def _leave_terminal() -> None:
    """What is said from now on goes nowhere: writing to a terminal that is gone fails, and that would break the drain off."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        # One that has hung up no longer says that it is a terminal, but still that it is a device.
        if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _announce(app: App, endpoints: Endpoints, settings: Settings, as_json: bool) -> None:
    facts = app.core.engine.facts()
    if as_json:
        output.print_json(
            {
                "model": app.core.model,
                "grpc": endpoints.grpc,
                "admin": endpoints.admin,
                "kafka": endpoints.kafka,
                "pid": os.getpid(),
                "load_s": round(facts.load_s, 3),
            }
        )
        return
    show = output.err.print
    kept = "" if facts.kv_cache_dtype == facts.dtype else f" of {facts.kv_cache_dtype}"
    show(
        f"[bold green]Sluice serves {escape(app.core.model)}[/] ({facts.dtype} on {facts.device}, {facts.attention_backend}, "
        f"{facts.num_blocks * facts.block_size:,} KV slots{kept}; loaded in {facts.load_s:.1f} s)"
    )
    show(f"  gRPC    {endpoints.grpc}")
    if endpoints.kafka:
        kind = "embedded, in memory, not durable" if settings.kafka.embedded else f"group {settings.kafka.group_id}"
        show(f"  Kafka   {endpoints.kafka}  [dim]({kind})[/]")
    show(f"  admin   http://{endpoints.admin}/readyz  /livez  /metrics")
    show("Try, in another terminal:")
    sluice = ".venv/bin/sluice" if Path(".venv/bin/sluice").exists() else "sluice"
    show(f'  {sluice} stream "Tell me a story about a river." --target {endpoints.grpc}')
    if endpoints.kafka:
        show(f'  {sluice} publish "What is the capital of France?" --wait --brokers {endpoints.kafka}')
        show(f"  {sluice} tail --chunks --brokers {endpoints.kafka}")
    else:
        show(f"  curl -s http://{endpoints.admin}/metrics")
    show("[dim]Ctrl-C drains and ends.[/]")
