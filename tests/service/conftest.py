"""Fixtures of the service's own tests."""

from collections.abc import AsyncIterator

import pytest

from service.tokenization import Tokenization
from tests.service.generation_bench import Bench
from tests.service.tiny_tokenizer import write_model_dir


@pytest.fixture(scope="module")
def tiny_tokenization(tmp_path_factory: pytest.TempPathFactory) -> Tokenization:
    return Tokenization(write_model_dir(tmp_path_factory.mktemp("model")))


@pytest.fixture
async def bench(tiny_tokenization: Tokenization) -> AsyncIterator[Bench]:
    bench = Bench(tiny_tokenization)
    yield bench
    await bench.engine.close()
    await bench.dispatch
    await bench.generation.drain(0.0)
    assert (bench.admission.num_requests, len(bench.streams)) == (0, 0), "everything was given back"
