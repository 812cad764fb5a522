"""What the composition root does about parts that fail."""

from pathlib import Path

import pytest
import structlog

from service.app import Core
from service.config import EngineSection, Settings
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
