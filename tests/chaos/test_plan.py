"""Plans and prompts are functions of their seed, and a replay file holds a plan whole."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos.plan import NETWORK_KINDS, Plan, Shape, draw_plan
from tests.chaos.prompts import make_prompt


def test_a_seed_gives_one_plan() -> None:
    assert draw_plan(7, Shape()) == draw_plan(7, Shape())
    assert draw_plan(7, Shape()) != draw_plan(8, Shape())


def test_a_plan_has_the_faults_that_its_shape_asks_for() -> None:
    counts = Counter(fault.kind for fault in draw_plan(3, Shape(replica_kills=20, broker_kills=3, network=12)).faults)
    assert (counts["kill"], counts["broker-kill"]) == (20, 3)
    assert {kind: counts[kind] for kind in NETWORK_KINDS} == dict.fromkeys(NETWORK_KINDS, 2)


def test_faults_come_in_order_and_within_the_run() -> None:
    times = [fault.at_s for fault in draw_plan(1, Shape(duration_s=60.0)).faults]
    assert times == sorted(times)
    assert all(0 < at_s < 60.0 for at_s in times)


def test_a_replay_file_holds_the_plan(tmp_path: Path) -> None:
    plan = draw_plan(5, Shape(prompts=10))
    plan.save(tmp_path / "replay.json")
    assert Plan.load(tmp_path / "replay.json") == plan


def test_a_replay_file_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    plan = {"seed": 1, "shape": {"prompt": 10}, "faults": []}
    (tmp_path / "replay.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=r"\['prompt'\]"):
        Plan.load(tmp_path / "replay.json")


def test_prompts_are_a_function_of_seed_and_number() -> None:
    options = {"partitions": 6, "min_tokens": 4, "max_tokens": 8}
    assert make_prompt(1, 2, **options) == make_prompt(1, 2, **options)
    assert make_prompt(1, 2, **options) != make_prompt(1, 3, **options)


def test_prompts_of_every_kind_come() -> None:
    prompts = [make_prompt(1, index, partitions=6, min_tokens=4, max_tokens=8) for index in range(400)]
    assert {prompt.kind for prompt in prompts} == {
        "tokens", "text", "two-choices", "unseeded", "expired", "bad-json", "bad-field", "unknown-field", "tombstone",
    }  # fmt: skip
    assert all(prompt.answers for prompt in prompts if prompt.kind in ("tokens", "two-choices"))
