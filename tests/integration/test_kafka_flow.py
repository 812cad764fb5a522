"""Prompts to results over a real broker, read back with another client library."""

import json

import pytest

from schemas.v1 import events_pb2, inference_pb2
from service.config import TracingSection
from service.contract import Source
from service.kafka.codec import derived_seed
from service.telemetry.tracing import Tracing
from tests.integration.kafka_harness import Broker, serving
from tests.service.kafka.fakes import FakeGeneration

pytestmark = pytest.mark.kafka


@pytest.fixture
def broker(kafka_server: str) -> Broker:
    return Broker(kafka_server)


async def test_a_prompt_record_ends_in_chunks_and_one_result(broker: Broker) -> None:
    async with serving(broker.section(), FakeGeneration()):
        await broker.say("four words are here", partition=1, headers={"sluice-label": b"mine", "correlation-id": b"\xff7"})
        (record,) = await broker.read(broker.topics.results, count=1)
        chunks = await broker.read(broker.topics.chunks, count=2)
    result = json.loads(record.value())
    request_id = f"{broker.topics.prompts}-1-0"
    assert result["request_id"] == request_id
    assert result["status"] == "finished"
    assert result["choices"][0]["text"] == "four words are here"
    assert result["label"] == "mine"
    assert result["source"] == {"topic": broker.topics.prompts, "partition": 1, "offset": "0"}
    assert (record.key(), record.partition()) == (request_id.encode(), 1)
    headers = dict(record.headers())
    assert headers["correlation-id"] == b"\xff7"
    assert (headers["sluice-type"], headers["content-type"]) == (b"result", b"application/json")
    started, *said = chunks
    assert dict(started.headers())["sluice-type"] == b"started"
    pieces = [json.loads(chunk.value()) for chunk in said]
    assert "".join(piece["text"] for piece in pieces) == "four words are here"
    assert [token for piece in pieces for token in piece["token_ids"]] == [0, 1, 2, 3]
    assert {(chunk.partition(), chunk.key()) for chunk in chunks} == {(1, request_id.encode())}


async def test_a_protobuf_prompt_is_answered_in_protobuf(broker: Broker) -> None:
    async with serving(broker.section(), FakeGeneration()):
        value = inference_pb2.Prompt(prompt="two words", label="p").SerializeToString()
        await broker.publish(value, headers={"content-type": b"application/x-protobuf"})
        (record,) = await broker.read(broker.topics.results, count=1)
        chunks = await broker.read(broker.topics.chunks, count=2)
    assert inference_pb2.Result.FromString(record.value()).choices[0].text == "two words"
    assert events_pb2.Started.FromString(chunks[0].value()).seed == derived_seed(
        Source(topic=broker.topics.prompts, partition=0, offset=0)
    )


async def test_the_trace_goes_from_the_producer_through_to_the_result(broker: Broker) -> None:
    spans = Tracing(TracingSection(), memory=True)
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    async with serving(broker.section(), FakeGeneration(), spans=spans):
        await broker.say("hello", headers={"traceparent": f"00-{trace_id}-{parent_id}-01".encode()})
        (record,) = await broker.read(broker.topics.results, count=1)
    by_name = {span.name: span for span in spans.spans()}
    process, send = by_name["process prompts"], by_name["send results"]
    assert f"{process.context.trace_id:032x}" == trace_id
    assert f"{process.parent.span_id:016x}" == parent_id
    assert [f"{link.context.span_id:016x}" for link in process.links] == [parent_id]
    assert send.parent.span_id == process.context.span_id
    assert dict(record.headers())["traceparent"] == f"00-{trace_id}-{send.context.span_id:016x}-01".encode()
    assert process.end_time >= send.end_time
    assert "commit prompts" in by_name


async def test_every_poison_record_gets_a_failed_result_and_a_dead_letter_and_the_next_is_served(broker: Broker) -> None:
    poison = {
        b"\xff\xfe": "invalid_json",
        b'{"prompt": "a", "prompt": "b"}': "invalid_json",
        b'{"prompt": "a", "wrong": 1}': "unknown_field",
        b'{"prompt": ""}': "invalid_field",
        b'{"prompt": "a", "sampling": {"max_tokens": -1}}': "invalid_field",
        b'{"prompt": "a", "sampling": {"top_p": NaN}}': "invalid_field",
        b'{"prompt": "refuse prompt_too_long"}': "prompt_too_long",
        b'{"prompt": "refuse too_many_tokens"}': "too_many_tokens",
        b'{"prompt": "fail numeric_error"}': "numeric_error",
        b'{"prompt": "break it"}': "internal",
    }
    async with serving(broker.section(), FakeGeneration()):
        await broker.publish(*poison)
        await broker.publish(b"{}", headers={"content-type": b"text/plain"})
        await broker.publish(b'{"prompt": "a"}', headers={"sluice-reply-to": b"elsewhere"})
        await broker.say("served")
        expected = [*poison.values(), "unsupported_content_type", "reply_to_refused"]
        results = await broker.results(len(expected) + 1)
        letters = await broker.read(broker.topics.dead_letters, count=len(expected))
    by_offset = {int(result["source"]["offset"]): result for result in results}
    assert [by_offset[offset]["error"]["code"] for offset in range(len(expected))] == expected
    assert by_offset[len(expected)]["choices"][0]["text"] == "served"
    dead = {int(letter["source"]["offset"]): letter for letter in (json.loads(record.value()) for record in letters)}
    assert [dead[offset]["error"]["code"] for offset in range(len(expected))] == expected
    assert len(results) == len(expected) + 1
    assert len(letters) == len(expected)


async def test_a_tombstone_completes_without_a_result(broker: Broker) -> None:
    async with serving(broker.section(), FakeGeneration()):
        await broker.publish(None)
        await broker.say("after")
        results = await broker.results(1)
    assert [result["source"]["offset"] for result in results] == ["1"]


async def test_an_expired_prompt_fails_without_reaching_the_engine(broker: Broker) -> None:
    generation = FakeGeneration()
    async with serving(broker.section(), generation):
        await broker.say("too late", headers={"sluice-deadline": b"2020-01-01T00:00:00Z"})
        (result,) = await broker.results(1)
    assert (result["status"], result["error"]["code"]) == ("failed", "deadline_exceeded")
    assert generation.calls == []


async def test_a_result_over_the_limit_loses_its_logprobs_first(broker: Broker) -> None:
    async with serving(broker.section(max_result_bytes=4_000), FakeGeneration()):
        await broker.publish(b'{"prompt": "short", "sampling": {"logprobs": 0}}')
        (result,) = await broker.results(1)
    assert result["choices"][0]["text"] == "short"
    assert result["choices"][0]["logprobs"] == []


async def test_a_result_that_fits_in_no_record_points_at_its_chunks(broker: Broker) -> None:
    async with serving(broker.section(max_result_bytes=4_000), FakeGeneration()):
        await broker.say("huge 9000", "next")
        results = await broker.results(2)
        (letter,) = await broker.read(broker.topics.dead_letters, count=1)
    by_offset = {result["source"]["offset"]: result for result in results}
    assert by_offset["0"]["error"]["code"] == "result_too_large"
    assert by_offset["0"]["usage"]["completion_tokens"] == 1
    assert by_offset["1"]["status"] == "finished"
    assert dict(letter.headers())["sluice-stage"] == b"write"
