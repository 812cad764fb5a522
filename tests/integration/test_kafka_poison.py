"""Records that the client library cannot read hold back their own partition alone, and nothing else."""

import json
import struct

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.record.util import calc_crc32c
from confluent_kafka import Producer

from service.kafka.transport import KafkaTransport
from tests.integration.kafka_harness import Broker, eventually, serving
from tests.service.kafka.fakes import FakeGeneration

pytestmark = pytest.mark.kafka


_NAME, _BROKEN_NAME = b"a name to break", b"\xff name to break"
# Of a record batch (magic 2): where its CRC-32C stands, and from where on it counts.
_CRC_AT, _COUNTED_FROM = 17, 21


@pytest.fixture
def broker(kafka_server: str) -> Broker:
    return Broker(kafka_server)


async def publish_with_a_broken_header_name(broker: Broker, *texts: str) -> None:
    """One batch on partition 0 whose last record has a header name that is no text."""
    producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap)
    await producer.start()
    try:
        batch = producer.create_batch()
        for index, text in enumerate(texts):
            headers = [(_NAME.decode(), b"x")] if index == len(texts) - 1 else []
            batch.append(key=None, value=json.dumps({"prompt": text}).encode(), timestamp=None, headers=headers)
        # No client library writes such a name: it is put into the bytes of the batch.
        raw = bytearray(bytes(batch._build()).replace(_NAME, _BROKEN_NAME))
        struct.pack_into(">I", raw, _CRC_AT, calc_crc32c(bytes(raw[_COUNTED_FROM:])))
        batch._buffer = raw
        await (await producer.send_batch(batch, broker.topics.prompts, partition=0))
    finally:
        await producer.stop()


def is_reported(transport: KafkaTransport) -> bool:
    return "cannot be read" in transport.status().reason


async def test_a_header_name_that_is_no_text_holds_back_its_partition_alone(broker: Broker) -> None:
    generation = FakeGeneration()
    async with serving(broker.section(), generation) as transport:
        await publish_with_a_broken_header_name(broker, "one", "two", "unreadable")
        await eventually(lambda: is_reported(transport))
        await broker.say("elsewhere", partition=1)
        results = await broker.results(3)
        assert transport.status().partitions == 2
    assert sorted(result["choices"][0]["text"] for result in results) == ["elsewhere", "one", "two"]


async def test_a_batch_that_no_codec_here_unpacks_holds_back_its_partition_alone(broker: Broker) -> None:
    generation = FakeGeneration()
    async with serving(broker.section(), generation) as transport:
        await broker.say("before")
        await broker.results(1)
        packer = Producer({"bootstrap.servers": broker.bootstrap, "compression.type": "lz4", "linger.ms": 0})
        packer.produce(broker.topics.prompts, json.dumps({"prompt": "packed " * 200}).encode(), partition=0)
        assert packer.flush(20) == 0
        await eventually(lambda: is_reported(transport))
        await broker.say("elsewhere", partition=1)
        results = await broker.results(2)
    assert sorted(result["choices"][0]["text"] for result in results) == ["before", "elsewhere"]
