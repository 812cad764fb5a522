"""`sluice serve` ends as it should, whatever becomes of those who read what it says."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import EngineProgress
from service.app import Endpoints
from service.cli import output, serve
from service.config import Settings
from service.health import Health


class FakeApp:
    """An app that is told to start and to stop, and counts the latter."""

    def __init__(self) -> None:
        self.core = SimpleNamespace(health=Health())
        self.num_stops = 0

    async def start(self) -> Endpoints:
        return Endpoints(grpc="127.0.0.1:1", admin="127.0.0.1:2", kafka="")

    async def stop(self) -> bool:
        self.num_stops += 1
        return True


def unread(*said: object) -> None:
    """What rich does where the reader of a pipe is gone."""
    try:
        raise BrokenPipeError
    except BrokenPipeError:
        raise SystemExit(1)  # noqa: B904 - as rich raises it


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> FakeApp:
    """The app that `_serve` makes; the process's own settings stay as they are."""
    made = FakeApp()
    monkeypatch.setattr(serve, "App", lambda settings, model_dir: made)
    for name in ("collect", "freeze", "set_threshold"):
        monkeypatch.setattr(gc, name, lambda *_: None)
    return made


@pytest.mark.parametrize("fails", ["draining", "announcement"])
async def test_it_drains_also_where_nobody_reads_what_it_says(
    app: FakeApp, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    monkeypatch.setattr(serve, "_on_signals", lambda stopping: stopping.set())
    monkeypatch.setattr(serve, "_announce", unread if fails == "announcement" else lambda *_: None)
    monkeypatch.setattr(output.err, "print", unread)
    with pytest.raises(SystemExit):
        await serve._serve(Settings(), Path(), as_json=False)
    assert app.num_stops == 1


async def test_a_second_signal_ends_at_once_also_where_nobody_reads_what_it_says(
    app: FakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers: dict[int, object] = {}
    ended: list[int] = []
    loop = SimpleNamespace(add_signal_handler=lambda number, handler: handlers.update({number: handler}))
    monkeypatch.setattr(serve.asyncio, "get_running_loop", lambda: loop)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(output.err, "print", unread)
    serve._on_signals(SimpleNamespace(is_set=lambda: True))  # type: ignore[arg-type]
    handle = handlers[signal.SIGTERM]
    assert callable(handle)
    with pytest.raises(SystemExit):
        handle()
    assert ended == [serve.SECOND_SIGNAL_EXIT]


async def test_the_bar_says_what_a_starting_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first start waits over a minute for the compiler."""
    told: list[tuple[float, str]] = []
    core = SimpleNamespace(health=Health())

    @contextmanager
    def progress(title: str) -> Iterator[Callable[[float, str], None]]:
        yield lambda share, what: told.append((share, what))

    async def start() -> None:
        for fraction, detail in ((0.0, "building the C++ operators"), (0.5, "")):
            core.health.engine_progress(EngineProgress(phase="loading", fraction=fraction, detail=detail))

    monkeypatch.setattr(output, "progress", progress)
    await serve.loading(core, start)
    assert told == [(0.0, "starting"), (0.0, "building the C++ operators"), (0.5, "loading")]
