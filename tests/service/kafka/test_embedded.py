"""The in-process broker on a port of our choice, and the whole transport on it."""

import json
from collections.abc import AsyncIterator

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from service.config import KafkaSection, TracingSection
from service.errors import SetupError
from service.kafka import EmbeddedBroker, KafkaTransport, Topics
from service.kafka.clients import Clients
from service.kafka.connection import Connection
from service.kafka.delivery import choose
from service.kafka.topics import create
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import Tracing
from tests.service.kafka.fakes import FakeGeneration, until

TOPICS = Topics("e.")


@pytest.fixture
async def broker() -> AsyncIterator[EmbeddedBroker]:
    broker = EmbeddedBroker(port=0)
    await broker.start(dict.fromkeys(TOPICS.required, 3))
    yield broker
    await broker.close()


async def test_a_second_broker_on_the_port_is_refused_with_a_remedy(broker: EmbeddedBroker) -> None:
    second = EmbeddedBroker(port=int(broker.bootstrap.rpartition(":")[2]))
    with pytest.raises(SetupError, match=r"kafka\.bootstrap_servers") as caught:
        await second.start({})
    assert caught.value.exit_code == 3


async def test_prompts_become_results_on_it(broker: EmbeddedBroker) -> None:
    section = KafkaSection(bootstrap_servers=broker.bootstrap, topic_prefix="e.", embedded=True)
    transport = KafkaTransport(section, FakeGeneration(), spans=Tracing(TracingSection()), metrics=Metrics().kafka)
    await transport.start()
    await until(lambda: transport.status().partitions == 3)
    async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap) as producer:
        for partition in range(3):
            await producer.send_and_wait(TOPICS.prompts, b'{"prompt": "on the mock"}', partition=partition)
    async with AIOKafkaConsumer(TOPICS.results, bootstrap_servers=broker.bootstrap, auto_offset_reset="earliest") as consumer:
        results = [json.loads((await consumer.getone()).value) for _ in range(3)]
    assert await transport.drain(5)
    assert {result["source"]["partition"] for result in results} == {0, 1, 2}
    assert {result["choices"][0]["text"] for result in results} == {"on the mock"}


async def test_it_is_known_from_outside_and_its_transactions_are_not_tried(broker: EmbeddedBroker) -> None:
    section = KafkaSection(bootstrap_servers=broker.bootstrap, topic_prefix="e.")
    delivery = await choose(section, Clients(section, Connection(section).aiokafka), TOPICS)
    assert (delivery.mode, delivery.reason) == ("at_least_once", "the embedded broker keeps no transactions")
    async with AIOKafkaConsumer(bootstrap_servers=broker.bootstrap) as consumer:
        partition = TopicPartition(TOPICS.dead_letters, 0)
        assert await consumer.end_offsets([partition]) == {partition: 0}


async def test_it_makes_no_topic_after_its_start(broker: EmbeddedBroker) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
    await admin.start()
    try:
        assert await create(admin, TOPICS, partitions=3) == ()
        with pytest.raises(SetupError, match=r"no topic f\.prompts, .*kafka\.topic_prefix with kafka\.partitions"):
            await create(admin, Topics("f."), partitions=3)
    finally:
        await admin.close()
