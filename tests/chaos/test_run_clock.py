"""The run's clock."""

from tests.chaos.run_clock import RunClock


def test_time_stands_still_while_it_is_stopped() -> None:
    now = 100.0
    clock = RunClock(lambda: now)
    now = 103.0
    clock.stop()
    now = 110.0
    stopped = clock.elapsed()
    clock.go_on()
    now = 112.0
    assert (stopped, clock.elapsed()) == (3.0, 5.0)
