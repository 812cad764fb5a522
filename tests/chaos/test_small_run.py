"""A small run in the default suite: one real broker behind its proxy, two replicas as processes, every fault that one broker allows."""

from pathlib import Path

import pytest

from tests.chaos.plan import Fault, Plan, Shape
from tests.chaos.run import run
from tests.chaos.scene import stage

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(280)]

SHAPE = Shape(prompts=120, duration_s=20.0, replicas=2, brokers=1, partitions=3, tokens_per_s=60.0)
FAULTS = (
    Fault(at_s=3.0, kind="kill", target=0),
    Fault(at_s=5.0, kind="lost-answer", for_s=3.0),
    Fault(at_s=7.0, kind="engine", target=1),
    Fault(at_s=9.0, kind="pause", target=1, for_s=5.0),
    Fault(at_s=13.0, kind="delete-input"),
    Fault(at_s=15.0, kind="barrier"),
    Fault(at_s=17.0, kind="cut"),
)


async def test_a_small_run_is_clean(tmp_path: Path) -> None:
    async with stage(1, tag="small-chaos") as on:
        outcome = await run(on, Plan(seed=11, shape=SHAPE, faults=FAULTS), tmp_path)
    assert outcome.verdict.report()["examples"] == []
    assert outcome.faults["crashes"] == []
    assert outcome.at_rest
    assert outcome.verdict.facts["streams_started_again"] > 0
