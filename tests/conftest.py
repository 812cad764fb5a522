"""Fixtures that rooms share: real servers, started once a session."""

import gc
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from engine.openmp import prefer_short_spin
from tests.servers import jaeger, kafka

# Brokers, children and tests share the cores.
prefer_short_spin()

# No test is judged by how long it took, an example of a property neither.
settings.register_profile("sluice", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sluice")


@pytest.fixture(scope="session", autouse=True)
def _imports_are_not_collected() -> None:
    """What collection made (a million objects of libraries and tests) stays: no later look for garbage goes through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _collected_between_modules(_imports_are_not_collected: None) -> Iterator[None]:
    """Destructors run here and nowhere else.

    A destructor that warns formats a traceback, which parses source; inside another parse (an assertion that is being explained)
    Python 3.11 answers "AST constructor recursion depth mismatch" and the run ends without a summary.
    """
    gc.disable()
    yield
    gc.collect()
    gc.enable()


@pytest.fixture(scope="session")
def kafka_server() -> Iterator[str]:
    """host:port of a real Apache Kafka broker. Fails, and never skips, when there can be none."""
    if address := kafka.external():
        yield address
        return
    try:
        with kafka.running(jvm_flags=kafka.SHORT_LIVED) as server:
            yield server.bootstrap
    except kafka.ServerError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def jaeger_server() -> Iterator[jaeger.JaegerServer]:
    """A real Jaeger. Fails, and never skips, when there can be none."""
    try:
        with jaeger.running() as server:
            yield server
    except jaeger.ServerError as error:
        pytest.fail(str(error), pytrace=False)
