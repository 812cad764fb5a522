"""The real model's streams through a SIGKILL of their owner; fifty of them: `python -m tests.chaos.streams`."""

import pytest

from tests.chaos.streams import run
from tests.servers.model import model_dir

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(600)]


async def test_each_client_reads_what_an_uninterrupted_run_says_when_the_owner_is_killed(kafka_server: str) -> None:
    outcome = await run(kafka_server, model_dir(), streams=12, tokens=24)
    assert (outcome.equal, outcome.results_equal, outcome.distinct_results, outcome.results) == (12, 12, 12, 12)
    assert outcome.moved > 0
