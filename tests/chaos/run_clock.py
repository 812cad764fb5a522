"""The time of a run: it stands still while no replica is there to be hit, so that faults keep their distance on a slow machine."""

import threading
import time
from collections.abc import Callable


class RunClock:
    """Seconds since its start, without those in which it was stopped. Read by threads; stopped and started by one."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began = now()
        self._stopped_at: float | None = None
        self._lost_s = 0.0
        self._lock = threading.Lock()

    def elapsed(self) -> float:
        """Seconds of the run."""
        with self._lock:
            return (self._now() if self._stopped_at is None else self._stopped_at) - self._began - self._lost_s

    def stop(self) -> None:
        """Time stands still. Idempotent."""
        with self._lock:
            if self._stopped_at is None:
                self._stopped_at = self._now()

    def go_on(self) -> None:
        """It passes again. Idempotent."""
        with self._lock:
            if self._stopped_at is not None:
                self._lost_s += self._now() - self._stopped_at
                self._stopped_at = None
