"""The admin port over real connections."""

import signal

import httpx
import pytest

from service.config import AdminSection
from service.errors import SetupError
from service.health import Health
from service.http.admin import AdminServer
from service.telemetry.metrics import Metrics


@pytest.fixture
async def admin():
    health, metrics = Health(), Metrics()
    server = AdminServer(AdminSection(port=0), health, metrics)
    port = await server.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        yield client, health, metrics, port
    await server.stop()


async def test_a_starting_service_is_live_and_not_ready(admin):
    client, *_ = admin
    live, ready = await client.get("/livez"), await client.get("/readyz")
    assert (live.status_code, ready.status_code) == (200, 503)
    assert ready.json()["progress"]["phase"] == "starting"
    assert ready.json()["reasons"]


async def test_a_ready_service_says_so(admin):
    client, health, *_ = admin
    health.engine_ready()
    assert (await client.get("/readyz")).status_code == 200


async def test_a_degraded_service_is_ready_and_says_why(admin):
    client, health, *_ = admin
    health.engine_ready()
    health.degrade("kafka", "no broker answers")
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()["reasons"]) == (200, ["kafka: no broker answers"])


async def test_a_dead_engine_is_never_200(admin):
    client, health, *_ = admin
    health.engine_ready()
    health.dead("it ended six times")
    statuses = [(await client.get(path)).status_code for path in ("/livez", "/readyz")]
    assert statuses == [503, 503]


async def test_metrics_are_shown_in_the_format_that_is_asked_for(admin):
    client, _, metrics, _ = admin
    metrics.ready(True)
    plain = await client.get("/metrics")
    rich = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert "sluice_ready 1.0" in plain.text
    assert rich.text.endswith("# EOF\n")
    assert rich.headers["content-type"].startswith("application/openmetrics-text")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/", 404), ("POST", "/readyz", 405)])
async def test_nothing_else_is_served(admin, method, path, status):
    assert (await admin[0].request(method, path)).status_code == status


async def test_a_port_in_use_names_the_setting(admin):
    with pytest.raises(SetupError, match=r"admin\.port"):
        await AdminServer(AdminSection(port=admin[3]), Health(), Metrics()).start()


async def test_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    server = AdminServer(AdminSection(port=0), Health(), Metrics())
    port = await server.start()
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"http://127.0.0.1:{port}/livez")).status_code == 200
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    await server.stop()
    await server.stop()
