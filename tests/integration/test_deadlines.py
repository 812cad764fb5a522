"""Deadlines of prompt records, end to end: passed while waiting, passed while running, and kept."""

import asyncio
import dataclasses
from pathlib import Path

import pytest

from service.rpc.client import SluiceClient, SluiceError, TokenStream
from tests.integration.app_harness import WAIT_S, app_of, greedy, settings
from tests.integration.kafka_harness import Broker, eventually
from tests.integration.test_app import chunked, prompt_record

pytestmark = pytest.mark.kafka


async def test_a_deadline_that_passes_in_the_queue_ends_the_prompt_before_the_engine_sees_it(
    tiny_model_dir: Path, topics_of_its_own: Broker
) -> None:
    broker = topics_of_its_own
    config = settings(tiny_model_dir, broker=broker, engine={"stand_in_tokens_per_s": 20.0}, admission={"max_requests": 1})
    async with app_of(config) as app:
        await broker.publish(prompt_record("long", 2_000))
        await eventually(lambda: app.core.admission.num_requests == 1)
        await broker.publish(prompt_record("waits", 5), headers={"sluice-ttl-ms": b"1000", "sluice-label": b"late"})
        (result,) = await broker.results(1)
    chunks = await broker.read(broker.topics.chunks, count=1)
    letters = await asyncio.to_thread(broker.read_now, broker.topics.dead_letters)
    assert (result["request_id"], result["label"]) == (f"{broker.topics.prompts}-0-1", "late")
    assert (result["status"], result["error"]["code"], result["choices"]) == ("failed", "deadline_exceeded", [])
    assert {record.key() for record in chunks} == {f"{broker.topics.prompts}-0-0".encode()}
    assert letters == []


async def test_a_deadline_that_passes_in_a_generation_ends_it_with_what_was_said(
    tiny_model_dir: Path, topics_of_its_own: Broker
) -> None:
    broker = topics_of_its_own
    config = settings(tiny_model_dir, broker=broker, engine={"stand_in_tokens_per_s": 20.0})
    async with app_of(config) as app:
        await eventually(lambda: app.core.health.report().state == "ready")
        await broker.publish(prompt_record("long", 2_000), headers={"sluice-ttl-ms": b"2000"})
        (result,) = await broker.results(1)
        # The engine has its blocks back.
        await eventually(lambda: app.core.admission.num_requests == 0)
        chunks = await asyncio.to_thread(broker.read_now, broker.topics.chunks)
    (choice,) = result["choices"]
    assert (result["status"], result["error"]["code"]) == ("failed", "deadline_exceeded")
    assert (choice["finish_reason"], 0 < len(choice["token_ids"]) < 2_000) == ("deadline", True)
    assert chunked(chunks) == {result["request_id"]: [int(token) for token in choice["token_ids"]]}


async def test_an_attached_reader_is_told_of_a_deadline_after_the_last_token(
    tiny_model_dir: Path, topics_of_its_own: Broker
) -> None:
    config = settings(tiny_model_dir, broker=topics_of_its_own, engine={"stand_in_tokens_per_s": 20.0})
    async with app_of(config) as app, SluiceClient(app.endpoints.grpc) as client:
        await eventually(lambda: app.core.health.report().state == "ready")
        request_id = await client.submit(dataclasses.replace(greedy("long", 2_000), ttl_ms=2_000))
        stream = client.attach(request_id)
        with pytest.raises(SluiceError) as caught:
            await asyncio.wait_for(to_the_end(stream), WAIT_S)
        result = await client.get(request_id)
    assert (caught.value.code, stream.counts) == ("deadline_exceeded", (len(result.choices[0].token_ids),))


async def to_the_end(stream: TokenStream) -> None:
    async for _ in stream:
        pass
