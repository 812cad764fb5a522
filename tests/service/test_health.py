"""Which state each report of the parts leads to."""

import pytest

from engine import EngineProgress
from service.health import Health, HealthReport


@pytest.fixture
def health() -> Health:
    return Health()


def test_it_starts_with_the_engines_progress(health):
    health.engine_progress(EngineProgress(phase="loading", fraction=0.5, detail="layer 15 of 30"))
    report = health.report()
    assert (report.state, report.phase, report.fraction, report.ready, report.live) == ("starting", "loading", 0.5, False, True)
    assert report.as_json()["progress"] == {"phase": "loading", "fraction": 0.5}
    assert "layer 15 of 30" in report.reasons[0]


def test_the_phase_ready_alone_makes_nothing_ready(health):
    health.engine_progress(EngineProgress(phase="ready", fraction=1.0))
    assert not health.report().ready


def test_it_is_ready_once_the_engine_is(health):
    health.engine_ready()
    assert health.report() == HealthReport(state="ready")


def test_a_part_that_others_can_do_without_degrades(health):
    health.engine_ready()
    health.degrade("kafka", "no broker answers")
    report = health.report()
    assert (report.state, report.ready, report.reasons) == ("degraded", True, ("kafka: no broker answers",))
    health.recover("kafka")
    assert health.report().state == "ready"


def test_a_restarting_engine_is_not_ready_until_it_says_so(health):
    health.engine_ready()
    health.engine_restarting("killed by signal 9")
    assert (health.report().state, health.report().ready) == ("starting", False)
    assert "signal 9" in health.report().reasons[0]
    health.engine_ready()
    assert health.report().ready


@pytest.mark.parametrize("later", ["engine_ready", "drain"])
def test_dead_stays_dead(health, later):
    health.dead("five restarts in 300 s")
    getattr(health, later)()
    assert (health.report().state, health.report().live, health.report().ready) == ("dead", False, False)


def test_draining_is_live_and_not_ready_and_stays_so(health):
    health.engine_ready()
    health.drain()
    health.engine_ready()
    assert (health.report().state, health.report().live, health.report().ready) == ("draining", True, False)


def test_watchers_see_the_present_and_each_change_once(health):
    seen: list[str] = []
    stop = health.watch(lambda report: seen.append(report.state))
    health.engine_ready()
    health.engine_ready()
    health.drain()
    stop()
    health.dead("over")
    assert seen == ["starting", "ready", "draining"]
