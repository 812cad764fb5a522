"""Classes of prompts, shares and bounds on a real broker: who is taken, who waits, and that waiting shows."""

import json

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic, PartitionMetadata

from service.kafka.topics import CLASSES
from service.telemetry.metrics import Metrics
from tests.integration.kafka_harness import Broker, eventually, serving
from tests.service.kafka.fakes import FakeGeneration

pytestmark = pytest.mark.kafka


@pytest.fixture
def broker(kafka_server: str) -> Broker:
    """One with a topic for each class, of one partition each."""
    broker = Broker(kafka_server, partitions=1)
    names = [f"{broker.topics.prompts}.{name}" for name in CLASSES]
    admin = AdminClient({"bootstrap.servers": kafka_server})
    for future in admin.create_topics([NewTopic(name, 1, 1) for name in names]).values():
        future.result(30)
    # A client that meets a topic before its leader leaves it out of the group's assignment.
    wanted = {*names, broker.topics.prompts}
    while not all(
        partition.leader >= 0
        for name, topic in admin.list_topics(timeout=20).topics.items()
        if name in wanted
        for partition in topic.partitions.values() or [PartitionMetadata()]
    ):
        continue
    return broker


def publish(broker: Broker, name: str, *texts: str, headers: dict[str, bytes] | None = None) -> None:
    producer = Producer({"bootstrap.servers": broker.bootstrap, "linger.ms": 0, "log_level": 0})
    for text in texts:
        producer.produce(f"{broker.topics.prompts}.{name}", json.dumps({"prompt": text}).encode(), headers=dict(headers or {}))
    assert producer.flush(20) == 0


async def test_batch_waits_first_and_its_waiting_shows(broker: Broker) -> None:
    generation, metrics = FakeGeneration(), Metrics()
    # A record of this size is taken for 25 tokens or so: batch stops after two, the others after four.
    section = broker.section(intake_high_tokens=80, intake_low_tokens=40, max_poll_records=1)
    async with serving(section, generation, metrics=metrics) as transport:
        await eventually(lambda: transport.status().partitions == 4)
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
    owners, num_sent = (f"{broker.topics.prompts}.batch=backfill",), 0
    for trusted, expected in ((False, {"a": "backfill", "b": ""}), (True, {"c": "header", "d": "header"})):
        generation = FakeGeneration()
        async with serving(broker.section(topic_tenants=owners, trusted_tenant_header=trusted), generation) as transport:
            await eventually(lambda seen=transport: seen.status().partitions == 4)
            batch, other = expected
            publish(broker, "batch", batch, headers={"sluice-tenant": b"header"})
            publish(broker, "standard", other, headers={"sluice-tenant": b"header"})
            num_sent += 2
            await broker.results(num_sent)
        assert {prompt.text: call.tenant for prompt, call in generation.calls} == expected
