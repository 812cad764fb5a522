"""`sluice demo` that is interrupted."""

import asyncio
from types import SimpleNamespace

import pytest

from service.cli import demo, output
from service.config import Settings
from service.health import Health


class SlowApp:
    """An app that neither starts nor stops before it is told to."""

    def __init__(self) -> None:
        self.core = SimpleNamespace(health=Health())
        self.starting, self.stopping, self.may_stop = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def start(self) -> None:
        self.starting.set()
        await asyncio.Event().wait()

    async def stop(self, *, grace_s: float) -> None:
        self.stopping.set()
        await self.may_stop.wait()


@pytest.mark.parametrize("times", [1, 2])
def test_it_says_interrupted_however_often_it_is_asked_to_end(times: int) -> None:
    async def interrupted() -> None:
        app = SlowApp()
        running = asyncio.create_task(demo._run(app, Settings(), output.err))  # type: ignore[arg-type]
        for begun in (app.starting, app.stopping)[:times]:
            await begun.wait()
            running.cancel()
        app.may_stop.set()
        await running

    # What `main` turns into "interrupted" and exit code 130.
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(interrupted())
