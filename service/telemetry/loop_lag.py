"""Measures how late the event loop runs its timers: the one number that shows a blocked loop."""

import asyncio
from collections.abc import Awaitable, Callable

from service.telemetry.metrics import Metrics


async def watch_loop_lag(
    metrics: Metrics,
    *,
    interval_s: float = 0.5,
    clock: Callable[[], float] | None = None,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> None:
    """Observes the lag every `interval_s` until it is cancelled. `clock` and `sleep` are replaceable for tests."""
    now = asyncio.get_running_loop().time if clock is None else clock
    while True:
        due = now() + interval_s
        await sleep(interval_s)
        metrics.loop_lag(max(0.0, now() - due))
