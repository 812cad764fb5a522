"""Classes of prompts, shares and bounds on a real broker: who is taken, who waits, that waiting shows, and topics that come late."""

import json

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from service.kafka import KafkaTransport
from service.kafka.topics import CLASSES
from service.telemetry.metrics import Metrics
from tests.integration.kafka_harness import Broker, eventually, make_class_topics, serving
from tests.service.kafka.fakes import FakeGeneration

pytestmark = pytest.mark.kafka

QUICK = {"topic_refresh_ms": 500}


@pytest.fixture
def broker(kafka_server: str) -> Broker:
    """One with topics of one partition, none of them a class's."""
    return Broker(kafka_server, partitions=1)


def publish(broker: Broker, name: str, *texts: str, headers: dict[str, bytes] | None = None) -> None:
    producer = Producer({"bootstrap.servers": broker.bootstrap, "linger.ms": 0, "log_level": 0})
    for text in texts:
        producer.produce(f"{broker.topics.prompts}.{name}", json.dumps({"prompt": text}).encode(), headers=dict(headers or {}))
    assert producer.flush(20) == 0


async def serves(transport: KafkaTransport, num_partitions: int) -> None:
    await eventually(lambda: transport.status().partitions == num_partitions)


async def test_batch_waits_first_and_its_waiting_shows(broker: Broker) -> None:
    make_class_topics(broker, *CLASSES)
    generation, metrics = FakeGeneration(), Metrics()
    # A record of this size is taken for 25 tokens or so: batch stops after two, the others after four.
    section = broker.section(intake_high_tokens=80, intake_low_tokens=40, max_poll_records=1, **QUICK)
    async with serving(section, generation, metrics=metrics) as transport:
        await serves(transport, 4)
        publish(broker, "batch", *(f"hold batch {number}" for number in range(5)))
        await eventually(lambda: transport.status().paused_partitions == 1)
        held = len(generation.calls)
        assert 1 <= held <= 2
        publish(broker, "interactive", "hold now")
        await eventually(lambda: "hold now" in generation.started_texts())

        def value(name: str) -> float:
            labels = {"topic": f"{broker.topics.prompts}.batch", "partition": "0"}
            return metrics.registry.get_sample_value(name, labels) or 0.0

        await eventually(lambda: value("sluice_kafka_lag") == 5 and value("sluice_backlog_seconds") > 0)
        generation.let_all_go()
        await broker.results(6)
        await eventually(lambda: value("sluice_kafka_lag") == 0 and value("sluice_backlog_seconds") == 0)
    assert transport.status().intake_tokens == 0


async def test_the_tenant_is_the_topics_unless_its_header_is_believed(broker: Broker) -> None:
    make_class_topics(broker, *CLASSES)
    owners, num_sent = (f"{broker.topics.prompts}.batch=backfill",), 0
    for trusted, expected in ((False, {"a": "backfill", "b": ""}), (True, {"c": "header", "d": "header"})):
        generation = FakeGeneration()
        section = broker.section(topic_tenants=owners, trusted_tenant_header=trusted, **QUICK)
        async with serving(section, generation) as transport:
            await serves(transport, 4)
            batch, other = expected
            publish(broker, "batch", batch, headers={"sluice-tenant": b"header"})
            publish(broker, "standard", other, headers={"sluice-tenant": b"header"})
            num_sent += 2
            await broker.results(num_sent)
        assert {prompt.text: call.tenant for prompt, call in generation.calls} == expected


@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
async def test_a_class_topic_comes_and_goes_while_a_generation_runs_on(broker: Broker, delivery: str) -> None:
    generation = FakeGeneration()
    async with serving(broker.section(delivery=delivery, **QUICK), generation) as transport:
        await broker.say("pause 2 words and then more")
        await eventually(lambda: generation.paused == 1)
        make_class_topics(broker, "batch")
        await serves(transport, 2)
        publish(broker, "batch", "late")
        assert [result["choices"][0]["text"] for result in await broker.results(1)] == ["late"]

        admin = AdminClient({"bootstrap.servers": broker.bootstrap})
        for future in admin.delete_topics([f"{broker.topics.prompts}.batch"]).values():
            future.result(30)
        await serves(transport, 1)
        await broker.say("next")
        assert len(await broker.results(2)) == 2
        assert (transport.status().state, transport.status().reason) == ("serving", "")

        generation.let_all_go()
        results = {result["choices"][0]["text"]: result for result in await broker.results(3)}
    assert (results["pause 2 words and then more"]["attempt"], generation.closed_early) == (1, [])
    assert len(generation.calls) == len(results) == 3


async def test_every_replica_of_the_group_reads_a_class_topic_that_came_late(kafka_server: str) -> None:
    broker = Broker(kafka_server, partitions=2)
    one, two = FakeGeneration(), FakeGeneration()
    async with serving(broker.section(**QUICK), one) as first, serving(broker.section(**QUICK), two) as second:
        await serves(first, 1)
        await serves(second, 1)
        make_class_topics(broker, "interactive")
        await serves(first, 2)
        await serves(second, 2)
        publish(broker, "interactive", *(f"prompt {number}" for number in range(8)))
        results = await broker.results(8)
    assert len({result["request_id"] for result in results}) == len(results) == 8
