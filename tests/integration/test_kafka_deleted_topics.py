"""A class's topic that is deleted, or made anew, under a running replica on a real broker: nothing taken is lost, no other class waits."""

import asyncio
from collections.abc import Mapping

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from confluent_kafka import TopicCollection
from confluent_kafka.admin import AdminClient

from service.kafka.topic_look import TopicLook, look
from service.telemetry.metrics import Metrics
from tests.integration.kafka_harness import Broker, eventually, make_class_topics, serving
from tests.integration.test_kafka_classes import QUICK, publish, serves
from tests.service.kafka.fakes import FakeGeneration

pytestmark = pytest.mark.kafka


@pytest.fixture
def broker(kafka_server: str) -> Broker:
    """Topics of one partition, of `batch` too."""
    broker = Broker(kafka_server, partitions=1)
    make_class_topics(broker, "batch")
    return broker


async def led(broker: Broker) -> Mapping[str, TopicLook]:
    """A look once every topic has its leaders: one this young may not be there yet."""
    names = {*broker.topics.required, f"{broker.topics.prompts}.batch"}
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
    await admin.start()
    try:
        async with asyncio.timeout(30):
            while not names <= (seen := await look(admin)).keys() or not all(seen[name].led for name in names):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    finally:
        await admin.close()
    return {name: seen[name] for name in names}


def delete_batch(broker: Broker) -> None:
    topic = f"{broker.topics.prompts}.batch"
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    admin.delete_topics([topic])[topic].result(30)


def deleted(metrics: Metrics) -> float:
    return metrics.registry.get_sample_value("sluice_kafka_retired_partitions_total") or 0.0


async def texts(broker: Broker, count: int) -> list[str]:
    return [result["choices"][0]["text"] for result in await broker.results(count)]


@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
async def test_what_runs_of_a_deleted_topic_ends_with_its_result(broker: Broker, delivery: str) -> None:
    generation, metrics = FakeGeneration(), Metrics()
    async with serving(broker.section(delivery=delivery, **QUICK), generation, metrics=metrics) as transport:
        await serves(transport, 2)
        publish(broker, "batch", "pause 2 words and then more")
        await eventually(lambda: generation.paused == 1)
        delete_batch(broker)
        await eventually(lambda: deleted(metrics) == 1)
        await broker.say("another class")
        assert await texts(broker, 1) == ["another class"]
        assert (transport.status().running, generation.closed_early) == (1, [])
        generation.let_all_go()
        assert await texts(broker, 2) == ["another class", "pause 2 words and then more"]
        await eventually(lambda: transport.status().intake_tokens == 0)
        assert (transport.status().state, transport.status().reason, transport.status().partitions) == ("serving", "", 1)


@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
async def test_a_topic_made_anew_is_read_from_its_start_once_the_old_ones_prompts_have_ended(
    broker: Broker, delivery: str
) -> None:
    generation, metrics = FakeGeneration(), Metrics()
    async with serving(broker.section(delivery=delivery, **QUICK), generation, metrics=metrics) as transport:
        await serves(transport, 2)
        publish(broker, "batch", "old 0", "pause 2 words and then more")
        await eventually(lambda: generation.paused == 1)
        assert await texts(broker, 1) == ["old 0"]
        delete_batch(broker)
        await eventually(lambda: deleted(metrics) == 1)
        make_class_topics(broker, "batch")
        publish(broker, "batch", "new 0", "new 1", "new 2")
        await serves(transport, 2)
        # Its requests have the ids of the old one's.
        assert [text for text in generation.started_texts() if text.startswith("new")] == []
        generation.let_all_go()
        assert await texts(broker, 5) == ["old 0", "pause 2 words and then more", "new 0", "new 1", "new 2"]
    epochs = [result["epoch"] for result in await broker.results(5)]
    assert epochs[0] == epochs[1] < epochs[2] == epochs[3] == epochs[4]
    again = FakeGeneration()
    async with serving(broker.section(delivery=delivery, **QUICK), again) as transport:
        await serves(transport, 2)
        await broker.say("last")
        assert (await texts(broker, 6))[-1] == "last"
    assert again.started_texts() == ["last"]


async def test_of_a_topic_made_anew_before_anybody_looked_no_prompt_is_lost(broker: Broker) -> None:
    generation = FakeGeneration()
    # There when the replica comes: it reads the topic before its first look at the topics, a second later.
    await led(broker)
    async with serving(broker.section(topic_refresh_ms=1_000), generation) as transport:
        await serves(transport, 2)
        publish(broker, "batch", "old 0", "old 1")
        assert await texts(broker, 2) == ["old 0", "old 1"]
        delete_batch(broker)
        make_class_topics(broker, "batch")
        publish(broker, "batch", "new 0", "new 1")
        # By place and log alone nobody could tell: as long as the old one, and the same name.
        await eventually(lambda: {"new 0", "new 1"} <= set(generation.started_texts()))
        assert {*await texts(broker, 4)} == {"old 0", "old 1", "new 0", "new 1"}
        await eventually(lambda: transport.status().partitions == 2)


async def test_a_topic_made_anew_while_no_replica_ran_is_read_from_its_start(broker: Broker) -> None:
    async with serving(broker.section(**QUICK), FakeGeneration()) as transport:
        await serves(transport, 2)
        publish(broker, "batch", "old 0", "old 1")
        await broker.results(2)
    delete_batch(broker)
    make_class_topics(broker, "batch")
    publish(broker, "batch", "new 0", "new 1", "new 2")
    generation = FakeGeneration()
    async with serving(broker.section(**QUICK), generation):
        await broker.results(5)
    assert generation.started_texts() == ["new 0", "new 1", "new 2"]


async def test_a_look_tells_the_identities_that_the_broker_gave(broker: Broker) -> None:
    seen = await led(broker)
    names = sorted(seen)
    other = AdminClient({"bootstrap.servers": broker.bootstrap})
    asked = other.describe_topics(TopicCollection(names))
    uuids = {name: future.result(30).topic_id for name, future in asked.items()}

    def as_hex(uuid: object) -> str:
        words = (uuid.get_most_significant_bits(), uuid.get_least_significant_bits())  # type: ignore[attr-defined]
        return "".join(f"{word & (2**64 - 1):016x}" for word in words)

    assert {name: seen[name].topic_id for name in names} == {name: as_hex(uuid) for name, uuid in uuids.items()}
    assert {(seen[name].num_partitions, seen[name].led) for name in names} == {(1, True)}
