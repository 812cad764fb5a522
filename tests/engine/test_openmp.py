"""How OpenMP's threads are told to wait and where to stay; a user who has said so is heard."""

import os

import pytest

from engine.openmp import SPIN_COUNT, pin_threads, prefer_short_spin

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_PLACES", "OMP_PROC_BIND")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment of its own that says nothing of OpenMP."""
    told = {name: value for name, value in os.environ.items() if name not in NAMES}
    monkeypatch.setattr(os, "environ", told)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 0, 3})
    return told


def said(environment: dict[str, str]) -> dict[str, str]:
    return {name: environment[name] for name in NAMES if name in environment}


def test_each_thread_gets_a_core_of_the_affinity_in_order(environment):
    pin_threads()
    assert said(environment) == {"OMP_PLACES": "{0},{3},{5}", "OMP_PROC_BIND": "close"}


def test_threads_that_the_user_has_placed_stay_there(environment):
    environment |= {"OMP_PLACES": "{7}", "OMP_PROC_BIND": "false"}
    pin_threads()
    assert said(environment) == {"OMP_PLACES": "{7}", "OMP_PROC_BIND": "false"}


def test_threads_spin_shortly(environment):
    prefer_short_spin()
    assert said(environment) == {"GOMP_SPINCOUNT": SPIN_COUNT}


@pytest.mark.parametrize("wish", [{"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "7"}], ids=str)
def test_a_user_who_has_said_how_to_wait_is_heard(environment, wish):
    environment |= wish
    prefer_short_spin()
    assert said(environment) == wish


def test_an_empty_word_is_none(environment):
    environment |= {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": ""}
    prefer_short_spin()
    assert environment["GOMP_SPINCOUNT"] == SPIN_COUNT
