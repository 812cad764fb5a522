"""What the composition root does about parts that fail."""

from pathlib import Path

import pytest
import structlog

from service.addresses import fault_of, listener
from service.app import App, Core
from service.config import AdminSection, EngineSection, GrpcSection, KafkaSection, Settings
from tests.service.fake_engine import FakeEngine
from tests.service.generation_bench import wait_until
from tests.service.tiny_tokenizer import write_model_dir


async def test_a_service_that_no_longer_hands_out_tokens_is_dead_and_still_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = Core(Settings(engine=EngineSection(kind="stand-in")), write_model_dir(tmp_path))
    core.engine = engine = FakeEngine()  # type: ignore[assignment]

    def fail(_: object) -> None:
        raise ZeroDivisionError("what it says may quote a prompt")

    monkeypatch.setattr(core.metrics.engine, "step", fail)
    with structlog.testing.capture_logs() as lines:
        await core.start()
        core.health.engine_ready()
        engine.say("r", 5)
        await wait_until(lambda: not core.health.report().live)
        await core.stop()
    assert [(line["log_level"], line["error"], line["where"][-1].split()[-1]) for line in lines] == [
        ("error", "ZeroDivisionError", "fail")
    ]
    assert "quote a prompt" not in f"{lines} {core.health.report()}"


def has_ipv6() -> bool:
    try:
        listener("::1", 0).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6; runs where the loopback ::1 is")
async def test_endpoints_of_ipv6_are_addresses_that_a_client_takes(tmp_path: Path) -> None:
    settings = Settings(
        engine=EngineSection(kind="stand-in"),
        grpc=GrpcSection(host="::1", port=0),
        admin=AdminSection(host="::1", port=0),
        kafka=KafkaSection(enabled=False),
    )
    app = App(settings, write_model_dir(tmp_path))
    app.core.engine = FakeEngine()  # type: ignore[assignment]
    endpoints = await app.start()
    try:
        assert [fault_of(endpoints.grpc), fault_of(endpoints.admin)] == ["", ""]
    finally:
        await app.stop(grace_s=0.0)
