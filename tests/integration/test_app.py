"""The whole service in one process, on a real broker: both surfaces at once, a killed engine, a broker that comes and goes."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.app import App
from service.errors import SetupError
from service.rpc.client import SluiceClient
from tests.integration.app_harness import app_of, greedy, settings, tokens_of
from tests.integration.kafka_harness import Broker, eventually
from tests.servers import kafka

pytestmark = pytest.mark.kafka


def prompt_record(text: str, tokens: int, *, seed: int = 7) -> bytes:
    return json.dumps({"prompt": text, "sampling": {"max_tokens": tokens, "seed": seed, "ignore_eos": True}}).encode()


def said(result: dict[str, Any]) -> list[int]:
    return [int(token) for token in result["choices"][0]["token_ids"]]


def state(app: App) -> str:
    return app.core.health.report().state


async def test_one_prompt_has_one_answer_over_kafka_and_grpc(tiny_model_dir: Path, topics_of_its_own: Broker) -> None:
    broker = topics_of_its_own
    async with app_of(settings(tiny_model_dir, broker=broker)) as app:
        await eventually(lambda: state(app) == "ready")
        async with SluiceClient(app.endpoints.grpc) as client:
            await broker.publish(prompt_record("hello world", 12))
            over_grpc = await tokens_of(client, greedy("hello world", 12))
            (result,) = await broker.results(1)
    assert (result["status"], len(over_grpc)) == ("finished", 12)
    assert said(result) == over_grpc


async def test_a_killed_engine_costs_no_reader_a_token_or_a_repetition(tiny_model_dir: Path, topics_of_its_own: Broker) -> None:
    broker, texts = topics_of_its_own, [f"prompt {index}" for index in range(4)]
    async with app_of(settings(tiny_model_dir)) as app, SluiceClient(app.endpoints.grpc) as client:
        whole = {text: await tokens_of(client, greedy(text, 60)) for text in texts}
    config = settings(tiny_model_dir, broker=broker, engine={"stand_in_tokens_per_s": 40.0})
    async with app_of(config) as app, SluiceClient(app.endpoints.grpc) as client:
        await eventually(lambda: state(app) == "ready")
        begun = [asyncio.Event() for _ in texts]
        streams = [
            asyncio.create_task(tokens_of(client, greedy(text, 60), event)) for text, event in zip(texts, begun, strict=True)
        ]
        await broker.publish(*(prompt_record(text, 60) for text in texts))
        await broker.read(broker.topics.chunks, count=6)
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), 30)
        dead = app.core.engine.status.pid
        os.kill(dead, signal.SIGKILL)
        streamed = await asyncio.gather(*streams)
        results = await broker.results(len(texts))
        assert app.core.engine.status.deaths == 1
        await eventually(lambda: state(app) == "ready" and app.core.engine.status.pid != dead)
        chunks = await every_chunk(broker, sum(len(tokens) for tokens in whole.values()))
    assert streamed == [whole[text] for text in texts]
    assert {result["source"]["offset"]: said(result) for result in results} == {
        str(offset): whole[text] for offset, text in enumerate(texts)
    }
    assert chunked(chunks) == {result["request_id"]: said(result) for result in results}


async def every_chunk(broker: Broker, tokens: int) -> list[Any]:
    """The chunk records once they hold this many tokens: chunks and results stand in topics of their own, without an order."""
    async with asyncio.timeout(30):
        while True:
            records = await broker.read(broker.topics.chunks, count=1)
            if sum(len(said) for said in chunked(records).values()) >= tokens:
                return records


def chunked(records: list[Any]) -> dict[str, list[int]]:
    """The tokens of each request as its chunk records say them; a gap or a repetition fails."""
    found: dict[str, list[int]] = {}
    for record in records:
        if dict(record.headers())["sluice-type"] != b"chunk":
            continue
        chunk = json.loads(record.value())
        tokens = found.setdefault(chunk["request_id"], [])
        assert int(chunk.get("seq", 0)) == len(tokens)
        tokens.extend(int(token) for token in chunk["token_ids"])
    return found


async def test_a_service_whose_engine_cannot_start_leaves_nothing_running(tmp_path: Path, tiny_model_dir: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((tiny_model_dir / name).read_bytes())
    (tmp_path / "config.json").write_text('{"vocab_size": "many"}')
    before = asyncio.all_tasks()
    with pytest.raises(SetupError, match="vocab_size"):
        async with app_of(settings(tmp_path)):
            pytest.fail("it started")
    assert asyncio.all_tasks() == before


@pytest.fixture
def own_server() -> Iterator[kafka.KafkaServer]:
    """A broker that a test may stop."""
    with kafka.running("app", kafka.SHORT_LIVED) as server:
        yield server


@pytest.mark.timeout(240)
async def test_without_its_broker_the_service_answers_over_grpc_and_takes_up_kafka_when_it_comes(
    tiny_model_dir: Path, own_server: kafka.KafkaServer
) -> None:
    broker = Broker(own_server.bootstrap)
    await broker.publish(prompt_record("early", 4))
    await asyncio.to_thread(own_server.stop)
    async with app_of(settings(tiny_model_dir, broker=broker)) as app, SluiceClient(app.endpoints.grpc) as client:
        assert state(app) == "degraded"
        assert len(await tokens_of(client, greedy("alone", 5))) == 5
        assert app.core.health.report().reasons[0].startswith("kafka: ")
        await asyncio.to_thread(own_server.start)
        await broker.results(1, within_s=90)
        await eventually(lambda: state(app) == "ready", within_s=60)
        await asyncio.to_thread(own_server.stop)
        await eventually(lambda: state(app) == "degraded", within_s=60)
        assert len(await tokens_of(client, greedy("alone again", 5))) == 5
        await asyncio.to_thread(own_server.start)
        await broker.publish(prompt_record("late", 4))
        results = await broker.results(2, within_s=90)
        await eventually(lambda: state(app) == "ready", within_s=60)
    assert [(result["source"]["partition"], result["source"]["offset"]) for result in results] == [(0, "0"), (0, "1")]
