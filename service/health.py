"""What this process may be asked: starting, ready, degraded, draining or dead; told by its parts, shown by every surface.

Guarantees: `ready` only between the engine's own word that it is ready and its end (never "yes" from a dead engine); `dead` and
`draining` are never left again; watchers are called on each change, in order, in the caller's thread. A part that others can do
without (Kafka while gRPC goes on) degrades and does not unready. Knows no transport and no clock.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from engine import EngineProgress

State = Literal["starting", "ready", "degraded", "draining", "dead"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthReport:
    """A moment's health. While `state` is starting, `fraction` of the phase in [0, 1] and what is being done; `reasons` say why it is not
    plainly ready."""

    state: State
    phase: str = ""
    fraction: float = 0.0
    detail: str = ""
    reasons: tuple[str, ...] = ()

    @property
    def live(self) -> bool:
        """False: only a restart of the process helps."""
        return self.state != "dead"

    @property
    def ready(self) -> bool:
        """True: requests are taken."""
        return self.state in ("ready", "degraded")

    def as_json(self) -> dict[str, Any]:
        """The body of /livez and /readyz."""
        body: dict[str, Any] = {
            "status": self.state, "live": self.live, "ready": self.ready, "reasons": list(self.reasons),
        }  # fmt: skip
        if self.state == "starting":
            body["progress"] = {"phase": self.phase, "fraction": round(self.fraction, 3)}
        return body


Watcher = Callable[[HealthReport], None]


class Health:
    """Owner of the health state. Its parts report in verbs; readers take `report()` or `watch`."""

    def __init__(self) -> None:
        self._engine_ready = False
        self._progress = EngineProgress(phase="starting", fraction=0.0)
        self._restart_reason = ""
        self._dead_reason = ""
        self._drain_reason = ""
        self._degraded: dict[str, str] = {}
        self._watchers: list[Watcher] = []
        self._last = self.report()

    def report(self) -> HealthReport:
        """The state now."""
        if self._dead_reason:
            return HealthReport(state="dead", reasons=(self._dead_reason,))
        if self._drain_reason:
            return HealthReport(state="draining", reasons=(self._drain_reason,))
        degraded = tuple(f"{part}: {reason}" for part, reason in self._degraded.items())
        if not self._engine_ready:
            phase, fraction, detail = self._progress.phase, self._progress.fraction, self._progress.detail
            why = self._restart_reason or f"engine is {phase}{detail and f': {detail}'}"
            return HealthReport(state="starting", phase=phase, fraction=fraction, detail=detail, reasons=(why, *degraded))
        return HealthReport(state="degraded" if degraded else "ready", reasons=degraded)

    def engine_progress(self, progress: EngineProgress) -> None:
        """A starting or restarting engine says how far it is. Readiness comes from `engine_ready` alone."""
        self._progress = progress
        self._changed()

    def engine_ready(self) -> None:
        """The engine takes requests."""
        self._engine_ready = True
        self._restart_reason = ""
        self._changed()

    def engine_restarting(self, reason: str) -> None:
        """The engine died or hung; another is being started. Not ready until it is."""
        self._engine_ready = False
        self._restart_reason = f"engine is restarting: {reason}"
        self._progress = EngineProgress(phase="starting", fraction=0.0)
        self._changed()

    def dead(self, reason: str) -> None:
        """Nothing here will serve again; the process should be replaced."""
        self._engine_ready = False
        self._dead_reason = self._dead_reason or reason
        self._changed()

    def degrade(self, part: str, reason: str) -> None:
        """A part that others can do without does not work."""
        self._degraded[part] = reason
        self._changed()

    def recover(self, part: str) -> None:
        """The part works (again)."""
        self._degraded.pop(part, None)
        self._changed()

    def drain(self, reason: str = "stopping") -> None:
        """No new requests; running ones finish."""
        self._drain_reason = self._drain_reason or reason
        self._changed()

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Calls `watcher` now and on each change; the returned function ends that."""
        self._watchers.append(watcher)
        watcher(self.report())

        def stop() -> None:
            if watcher in self._watchers:
                self._watchers.remove(watcher)

        return stop

    def _changed(self) -> None:
        report = self.report()
        if report == self._last:
            return
        self._last = report
        for watcher in tuple(self._watchers):
            watcher(report)
