"""A prompt that ends the engine, from its record to its dead letter and back: with its identity, beside neighbours that finish."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from service import engine_child
from tests.integration.app_harness import app_of, flags, run, settings, values
from tests.integration.kafka_harness import Broker, eventually
from tests.integration.test_app import prompt_record

pytestmark = pytest.mark.kafka

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACE = f"00-{TRACE_ID}-b7ad6b7169203331-01".encode()
POISON = 265
HEADERS = {"sluice-label": b"order 7", "traceparent": TRACE, "sluice-idempotency-key": b"k-7"}
REQUEST = json.dumps({"token_ids": [POISON], "sampling": {"max_tokens": 4, "ignore_eos": True}}).encode()


def poisonable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children end when they are given the poison."""
    passed_on = engine_child.child_environment
    fault = {"SLUICE_STAND_IN_FAULT": f"poison@{POISON}"}
    monkeypatch.setattr(engine_child, "child_environment", lambda environment: passed_on(environment) | fault)


def by_id(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    assert len({result["request_id"] for result in results}) == len(results)
    return {result["request_id"]: result for result in results}


async def test_a_prompt_that_ends_the_engine_twice_becomes_a_dead_letter_and_its_neighbours_finish(
    tiny_model_dir: Path, topics_of_its_own: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = topics_of_its_own
    poisonable(monkeypatch)
    config = settings(tiny_model_dir, broker=broker, engine={"stand_in_tokens_per_s": 100.0})
    async with app_of(config) as app:
        await broker.publish(*(prompt_record(f"before {number}", 40) for number in range(3)), partition=0)
        await broker.read(broker.topics.chunks, count=3)
        await broker.publish(REQUEST, partition=1, headers=HEADERS)
        await broker.publish(*(prompt_record(f"behind {number}", 40) for number in range(3)), partition=1)
        results = by_id(await broker.results(7))
        (record,) = await broker.read(broker.topics.dead_letters, count=1)
        assert app.core.engine.status.deaths == 2
    poison = results.pop(f"{broker.topics.prompts}-1-0")
    assert (poison["status"], poison["error"]["code"], poison["label"]) == ("failed", "crash_loop", "order 7")
    assert [(result["status"], len(result["choices"][0]["token_ids"])) for result in results.values()] == [("finished", 40)] * 6
    letter = json.loads(record.value())
    assert (letter["request_id"], letter["error"]["code"], letter["stage"]) == (poison["request_id"], "crash_loop", "generate")
    assert letter["source"] == {"topic": broker.topics.prompts, "partition": 1, "offset": "0"}
    assert base64.b64decode(letter["original_value"]) == REQUEST
    assert {name: base64.b64decode(value) for name, value in letter["original_headers"].items()} == HEADERS
    assert letter["traceparent"].split("-")[1] == TRACE_ID


async def test_a_replayed_prompt_keeps_its_identity_and_its_idempotency_key(
    tiny_model_dir: Path, topics_of_its_own: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = topics_of_its_own
    config, prompts = settings(tiny_model_dir, broker=broker), broker.topics.prompts
    with monkeypatch.context() as faulty:
        poisonable(faulty)
        async with app_of(config):
            await broker.publish(REQUEST, headers=HEADERS)
            await broker.read(broker.topics.dead_letters, count=1)
    async with app_of(config) as app:
        await eventually(lambda: app.core.health.report().state == "ready")
        kafka = flags({"kafka": values(tiny_model_dir, broker=broker)["kafka"]})
        code, out, errors = await run("dlq", "replay", f"{prompts}-0-0", "--json", *kafka)
        assert (code, json.loads(out)["request_id"]) == (0, f"{prompts}-0-1"), errors
        results = by_id(await broker.results(2))
        # What comes with the key from now on is the same prompt.
        await broker.publish(REQUEST, headers=HEADERS)
        records = await broker.read(broker.topics.results, count=3)
    replayed = results[f"{prompts}-0-1"]
    assert (replayed["status"], replayed["label"], len(replayed["choices"][0]["token_ids"])) == ("finished", "order 7", 4)
    again, third = (dict(record.headers()) for record in records[1:])
    assert (again["sluice-replay-of"], again["traceparent"].split(b"-")[1].decode()) == (f"{prompts}-0-0".encode(), TRACE_ID)
    assert third["sluice-duplicate-of"] == replayed["request_id"].encode()
    assert json.loads(records[2].value())["choices"] == replayed["choices"]
