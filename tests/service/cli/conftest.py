"""Fixtures of the commands' tests."""

from pathlib import Path

import pytest

from tests.service.cli.cli_run import Sluice
from tests.service.tiny_tokenizer import write_model_dir


@pytest.fixture
def sluice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sluice:
    monkeypatch.setenv("COLUMNS", "120")
    return Sluice(monkeypatch, capsys)


@pytest.fixture
def stand_in(tmp_path: Path) -> list[str]:
    """Options that serve a model directory without a model."""
    return ["--set", "engine.kind=stand-in", "--set", f"model.path={write_model_dir(tmp_path)}"]
