"""The lag is what passed beyond the wait that was asked for."""

import asyncio

import pytest

from service.telemetry.loop_lag import watch_loop_lag
from service.telemetry.metrics import Metrics


async def test_a_late_timer_is_observed_as_its_lateness():
    metrics, now = Metrics(), [0.0]

    async def sleep(seconds: float) -> None:
        if now[0] > 1:
            raise asyncio.CancelledError
        now[0] += seconds + 0.25

    with pytest.raises(asyncio.CancelledError):
        await watch_loop_lag(metrics, interval_s=0.5, clock=lambda: now[0], sleep=sleep)
    assert metrics.registry.get_sample_value("sluice_event_loop_lag_seconds_count") == 2
    assert metrics.registry.get_sample_value("sluice_event_loop_lag_seconds_sum") == pytest.approx(0.5)
