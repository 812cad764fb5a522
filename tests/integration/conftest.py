"""Fixtures of the tests of the whole service."""

from pathlib import Path

import pytest

from tests.integration.kafka_harness import Broker
from tests.service.tiny_tokenizer import write_model_dir


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stand-in engine and tokenization need of a model."""
    return write_model_dir(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture
def topics_of_its_own(kafka_server: str) -> Broker:
    """The real broker, with fresh topics."""
    return Broker(kafka_server)
