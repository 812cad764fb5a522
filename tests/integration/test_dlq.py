"""Dead letters and progress from a terminal, on a real broker with a real replica."""

import json
from pathlib import Path

import pytest

from tests.integration.app_harness import app_of, flags, run, settings, values
from tests.integration.kafka_harness import Broker

pytestmark = pytest.mark.kafka

TRACE = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_dead_letters_are_listed_shown_and_replayed_with_their_identity(
    tiny_model_dir: Path, topics_of_its_own: Broker
) -> None:
    broker = topics_of_its_own
    kafka = flags({"kafka": values(tiny_model_dir, broker=broker)["kafka"]})
    headers = {"sluice-label": b"order 7", "traceparent": TRACE, "sluice-idempotency-key": b"k-7"}
    async with app_of(settings(tiny_model_dir, broker=broker)):
        await broker.publish(b'{"prompt": "a", "model": "later"}', partition=1, headers=headers)
        await broker.publish(b"not JSON")
        await broker.read(broker.topics.dead_letters, count=2)
        prompts = broker.topics.prompts

        code, out, errors = await run("dlq", "list", "--json", *kafka)
        rows = {row["code"]: row for row in map(json.loads, out.splitlines())}
        assert (code, errors, set(rows)) == (0, "", {"unknown_model", "invalid_json"})
        assert (
            rows["unknown_model"] | {"request_id": f"{prompts}-1-0", "field": "model", "label": "order 7"}
            == rows["unknown_model"]
        )

        code, out, errors = await run("dlq", "show", f"{prompts}-1-0", *kafka)
        assert (code, errors) == (0, "")
        for words in ("unknown_model", '{"prompt": "a", "model": "later"}', "sluice-label: order 7"):
            assert words in out

        code, out, errors = await run("dlq", "replay", "--code", "unknown_model", "--json", *kafka)
        assert (code, errors) == (0, "")
        assert json.loads(out) == {"replay_of": f"{prompts}-1-0", "request_id": f"{prompts}-1-1", "topic": prompts}
        results = [
            dict(record.headers()) | {"key": record.key()} for record in await broker.read(broker.topics.results, count=3)
        ]
        (again,) = [result for result in results if result["key"] == f"{prompts}-1-1".encode()]
        assert (again["sluice-replay-of"], again["sluice-label"]) == (f"{prompts}-1-0".encode(), b"order 7")
        assert again["traceparent"].split(b"-")[1] == TRACE.split(b"-")[1]
        record = [one for one in await broker.read(prompts, count=3) if one.partition() == 1][1]
        assert dict(record.headers()) == {**headers, "sluice-replay-of": f"{prompts}-1-0".encode()}

    code, out, errors = await run("offsets", "show", "--json", *kafka)
    rows = {row["partition"]: row for row in map(json.loads, out.splitlines())}
    assert (code, errors) == (0, "")
    partition = rows[f"{prompts}-1"]
    assert (partition["low"], partition["end"], partition["lag"], partition["unfinished"]) == (2, 2, 0, [])
    assert partition["epoch"] >= 1


async def test_what_is_not_there_is_said(topics_of_its_own: Broker, tmp_path: Path) -> None:
    kafka = flags({"kafka": values(tmp_path, broker=topics_of_its_own)["kafka"]})
    code, out, errors = await run("dlq", "replay", "nothing-0-0", *kafka)
    assert (code, out) == (1, "")
    assert "no dead letter for nothing-0-0" in errors
