"""Durable requests over gRPC on two replicas and a real broker: submitted on one, read, cancelled and found on the other."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from confluent_kafka import Producer

from schemas.v1 import inference_pb2
from service.app import App
from service.contract import Delta, Finished, Started
from service.rpc.client import Backoff, SluiceClient, SluiceError
from service.tokenization import Tokenization
from tests.integration.app_harness import WAIT_S, Values, app_of, greedy, run, serve, settings, tokens_of, values
from tests.integration.kafka_harness import Broker, eventually, make_class_topics
from tests.integration.test_app import prompt_record

pytestmark = pytest.mark.kafka

PATIENT = Backoff(first_s=0.05, most_s=0.5, attempts=200)
Status = inference_pb2.Result.Status


@asynccontextmanager
async def two_replicas(model_dir: Path, broker: Broker, **engine: object) -> AsyncIterator[tuple[App, App]]:
    """Two services of one group, each with a partition of its own."""
    async with AsyncExitStack() as stack:
        config = settings(model_dir, broker=broker, engine=engine, tracing={"sample_ratio": 1.0})
        apps = [await stack.enter_async_context(app_of(config, keep_spans=True)) for _ in range(2)]
        await eventually(lambda: all(app._kafka is not None and app._kafka.status().partitions == 1 for app in apps))
        yield apps[0], apps[1]


@asynccontextmanager
async def clients(*targets: str) -> AsyncIterator[list[SluiceClient]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(SluiceClient(target)) for target in targets]


async def attached(
    client: SluiceClient, request_id: str, after: tuple[int, ...] = (), begun: asyncio.Event | None = None
) -> list[int]:
    """The tokens as they came; a gap, a repetition or a missing end fails."""
    said: list[int] = []
    first = after[0] if after else 0
    kinds: list[type] = []
    async with asyncio.timeout(WAIT_S), client.attach(request_id, after) as events:
        async for event in events:
            kinds.append(type(event))
            if isinstance(event, Delta):
                assert event.seq == first + len(said)
                said.extend(event.token_ids)
                if begun is not None and said:
                    begun.set()
    assert (kinds[0], kinds[-1], kinds.count(Started)) == (Started, Finished, 1)
    return said


async def test_a_prompt_submitted_on_one_replica_is_read_live_and_past_on_both(
    tiny_model_dir: Path, topics_of_its_own: Broker
) -> None:
    broker = topics_of_its_own
    async with (
        two_replicas(tiny_model_dir, broker, stand_in_tokens_per_s=60.0) as apps,
        clients(*(app.endpoints.grpc for app in apps)) as (one, other),
    ):
        whole = await tokens_of(one, greedy("hello world", 40))
        request_id = await one.submit(greedy("hello world", 40), key="conversation-7")
        assert (await other.get(request_id)).status == Status.Value("pending")
        live = await asyncio.gather(attached(one, request_id), attached(other, request_id), attached(other, request_id, (10,)))
        assert live == [whole, whole, whole[10:]]
        past = await asyncio.gather(attached(one, request_id), attached(other, request_id), attached(other, request_id, (40,)))
        assert past == [whole, whole, []]
        results = [await client.get(request_id) for client in (one, other)]
        assert [(result.status, list(result.choices[0].token_ids)) for result in results] == [
            (Status.Value("finished"), whole)
        ] * 2
        assert results[0] == results[1]
    # A reader has its last event before its call's span ends; once the replicas have stopped, every span has.
    link_of_attach(apps)


def link_of_attach(apps: tuple[App, App]) -> None:
    """Every Attach span links to the span that processed the prompt, and is no child of it."""
    spans = [span for app in apps for span in app.core.tracing.spans()]
    (processed,) = (span.context for span in spans if span.name == "process prompts")
    attaches = [span for span in spans if span.name == "sluice.v1.Inference/Attach"]
    assert len(attaches) == 6
    assert all(span.parent is None for span in attaches)
    assert {span.links[0].context.trace_id for span in attaches} == {processed.trace_id}
    # One that read the result alone links to the span that sent it.
    assert processed.span_id in {span.links[0].context.span_id for span in attaches}


async def test_a_reader_is_shown_exactly_what_follows_its_tokens_live_and_past(
    tiny_model_dir: Path, topics_of_its_own: Broker
) -> None:
    broker, tokenization = topics_of_its_own, Tokenization(tiny_model_dir)
    async with (
        two_replicas(tiny_model_dir, broker, stand_in_tokens_per_s=60.0) as apps,
        clients(*(app.endpoints.grpc for app in apps)) as (one, other),
    ):
        request_id = await one.submit(greedy("hello world", 40), key="conversation-7")
        counts = (1, 3, 10, 29)
        live = await asyncio.gather(*(text_after(client, request_id, n) for client in (one, other) for n in counts))
        whole = (await one.get(request_id)).choices[0]
        expected = [whole.text[tokenization.num_characters(whole.token_ids[:n]) :] for n in counts]
        assert live == expected * 2
        assert [await text_after(client, request_id, n) for client in (one, other) for n in counts] == expected * 2
        code, out, errors = await run("attach", request_id, "--after-seq", "10", "--json", "--target", apps[1].endpoints.grpc)
    said = [json.loads(line) for line in out.splitlines()]
    assert (code, "".join(item.get("text", "") for item in said)) == (0, expected[2]), errors


async def text_after(client: SluiceClient, request_id: str, num_tokens: int) -> str:
    async with asyncio.timeout(WAIT_S), client.attach(request_id, (num_tokens,)) as events:
        return "".join([event.text async for event in events if isinstance(event, Delta)])


async def test_a_cancel_on_any_replica_ends_the_request_once(tiny_model_dir: Path, topics_of_its_own: Broker) -> None:
    broker = topics_of_its_own
    async with (
        two_replicas(tiny_model_dir, broker, stand_in_tokens_per_s=20.0) as apps,
        clients(*(app.endpoints.grpc for app in apps)) as (one, other),
    ):
        for number, canceller in enumerate((one, other)):
            request_id = await one.submit(greedy("for ever", 2_000), key="conversation-7")
            begun = asyncio.Event()
            reading = asyncio.create_task(attached(other, request_id, begun=begun))
            await asyncio.wait_for(begun.wait(), WAIT_S)
            assert await asyncio.gather(canceller.cancel(request_id), canceller.cancel(request_id)) == [True, True]
            with pytest.raises(SluiceError) as caught:
                await asyncio.wait_for(reading, WAIT_S)
            assert caught.value.code == "cancelled"
            results = await broker.results(number + 1)
            assert (results[-1]["request_id"], results[-1]["status"]) == (request_id, "cancelled")
            assert (await other.get(request_id)).status == Status.Value("cancelled")
            await eventually_ended(other, request_id)
        assert len(results) == 2


async def eventually_ended(client: SluiceClient, request_id: str) -> None:
    """A cancel says so once the offset is committed, too."""
    async with asyncio.timeout(WAIT_S):
        while await client.cancel(request_id):  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.02)


async def test_a_prompt_that_waits_is_cancelled_before_its_turn(tiny_model_dir: Path, topics_of_its_own: Broker) -> None:
    broker = topics_of_its_own
    config = settings(tiny_model_dir, broker=broker, engine={"stand_in_tokens_per_s": 20.0}, admission={"max_requests": 2})
    async with app_of(config) as app, clients(app.endpoints.grpc) as (client,):
        await eventually(lambda: app.core.health.report().state == "ready")
        running = [await client.submit(greedy(f"long {number}", 2_000), key="same") for number in range(4)]
        await eventually(lambda: app.core.admission.num_requests > 0)
        assert await client.cancel(running[-1])
        (result,) = await broker.results(1)
        assert (result["request_id"], result["status"], result["choices"]) == (running[-1], "cancelled", [])
        for request_id in running:
            await client.cancel(request_id)
        assert [result["status"] for result in await broker.results(4)] == ["cancelled"] * 4


async def test_a_cancel_that_was_written_while_nobody_ran_is_found(tiny_model_dir: Path, topics_of_its_own: Broker) -> None:
    broker = topics_of_its_own
    request_id = f"{broker.topics.prompts}-0-0"
    await broker.publish(prompt_record("for ever", 2_000))
    producer = Producer({"bootstrap.servers": broker.bootstrap})
    producer.produce(broker.topics.control, json.dumps({"request_id": request_id}).encode())
    assert await asyncio.to_thread(producer.flush, 20) == 0
    async with app_of(settings(tiny_model_dir, broker=broker, engine={"stand_in_tokens_per_s": 20.0})):
        (result,) = await broker.results(1)
    assert (result["request_id"], result["status"]) == (request_id, "cancelled")


@pytest.mark.parametrize(
    ("request_id", "words"),
    [
        ("not-an-id", "topic-partition-offset"),
        ("{prompts}-0-7", "ends at offset 0"),
        ("{prompts}-9-0", "has no partition 9"),
        ("{results}-0-0", "topic-partition-offset"),
    ],
)
async def test_an_id_that_names_nothing_is_refused_with_what_to_do(
    tiny_model_dir: Path, topics_of_its_own: Broker, request_id: str, words: str
) -> None:
    broker = topics_of_its_own
    named = request_id.format(prompts=broker.topics.prompts, results=broker.topics.results)
    async with app_of(settings(tiny_model_dir, broker=broker)) as app, clients(app.endpoints.grpc) as (client,):
        for call in (client.get(named), anext(client.attach(named))):
            with pytest.raises(SluiceError) as caught:
                await call
            assert (caught.value.code, caught.value.field) == ("unknown_request", "request_id")
            assert words in caught.value.message


async def test_bad_prompts_are_refused_before_they_are_written(tiny_model_dir: Path, topics_of_its_own: Broker) -> None:
    broker = topics_of_its_own
    async with app_of(settings(tiny_model_dir, broker=broker)) as app, clients(app.endpoints.grpc) as (client,):
        with pytest.raises(SluiceError) as caught:
            await client.submit(greedy("", 4))
        assert (caught.value.code, caught.value.field) == ("invalid_field", "prompt")
        with pytest.raises(SluiceError) as caught:
            await client.submit(greedy("hot", 0))
        assert (caught.value.code, caught.value.field) == ("invalid_field", "sampling.max_tokens")
        request_id = await client.submit(greedy("good", 4))
        assert (request_id.rsplit("-", 1)[1], len(await attached(client, request_id))) == ("0", 4)


async def test_a_prompt_is_submitted_to_the_class_that_its_caller_names(
    tiny_model_dir: Path, topics_of_its_own: Broker
) -> None:
    broker = topics_of_its_own
    make_class_topics(broker, "batch")
    async with app_of(settings(tiny_model_dir, broker=broker)) as app, clients(app.endpoints.grpc) as (client,):
        batch, standard = [await client.submit(greedy("good", 4), queue_class=name) for name in ("batch", "standard")]
        assert (batch.rsplit("-", 2)[0], standard.rsplit("-", 2)[0]) == (
            f"{broker.topics.prompts}.batch",
            # It has no topic of its own here.
            broker.topics.prompts,
        )
        assert len(await attached(client, batch)) == len(await attached(client, standard)) == 4
        for name, words in (("urgent", "interactive, standard, batch"), ("interactive", "topics create --class interactive")):
            with pytest.raises(SluiceError) as caught:
                await client.submit(greedy("good", 4), queue_class=name)
            assert (caught.value.code, caught.value.field) == ("invalid_field", "queue_class")
            assert words in caught.value.message


async def test_the_command_submits_to_a_class(tiny_model_dir: Path, topics_of_its_own: Broker) -> None:
    broker = topics_of_its_own
    make_class_topics(broker, "interactive")
    async with app_of(settings(tiny_model_dir, broker=broker)) as app:
        target = ("--target", app.endpoints.grpc)
        code, out, errors = await run("submit", "hello", "--class", "interactive", "--json", *target)
        assert (code, json.loads(out)["request_id"].rsplit("-", 2)[0]) == (0, f"{broker.topics.prompts}.interactive"), errors
        code, out, errors = await run("submit", "hello", "--class", "urgent", *target)
    assert (code, out) == (2, "")
    assert "queue_class: must be one of interactive, standard, batch" in errors


def of_replica(model_dir: Path, broker: Broker, **engine: object) -> Values:
    return values(model_dir, broker=broker, engine=engine, kafka={"session_timeout_ms": 6_000})


@pytest.mark.timeout(240)
async def test_killing_the_owner_costs_no_attached_reader_a_token_or_a_repetition(
    tiny_model_dir: Path, topics_of_its_own: Broker
) -> None:
    broker, texts = topics_of_its_own, [f"prompt {index}" for index in range(6)]
    async with app_of(settings(tiny_model_dir)) as app, SluiceClient(app.endpoints.grpc) as client:
        whole = [await tokens_of(client, greedy(text, 80)) for text in texts]
    config = of_replica(tiny_model_dir, broker, stand_in_tokens_per_s=20.0)
    async with serve(config) as first, serve(config) as second:
        targets = [first.facts["grpc"], second.facts["grpc"]]
        async with SluiceClient(targets, backoff=PATIENT) as moving, SluiceClient(targets[1], backoff=PATIENT) as staying:
            ids = [await staying.submit(greedy(text, 80), key=text) for text in texts]
            begun = [asyncio.Event() for _ in ids]
            reading = [
                asyncio.create_task(attached(staying, request_id, begun=event))
                for request_id, event in zip(ids, begun, strict=True)
            ]
            reading += [asyncio.create_task(attached(moving, request_id)) for request_id in ids]
            await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), WAIT_S)
            first.process.kill()
            said = await asyncio.gather(*reading)
            # One that comes late, too.
            assert [await attached(staying, request_id) for request_id in ids] == whole
        results = await broker.results(len(ids))
    assert said == whole + whole
    assert sorted(result["request_id"] for result in results) == sorted(ids)
