"""Topics on a real broker: made with the defaults, found to fit, left alone the second time."""

import uuid

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from service.config import KafkaSection
from service.kafka import topics
from service.kafka.connection import Connection
from service.kafka.topic_check import check
from service.kafka.topics import Topics

pytestmark = pytest.mark.kafka


async def test_default_replication_makes_topics_that_fit(kafka_server: str) -> None:
    names = Topics(f"t{uuid.uuid4().hex[:10]}.")
    section = KafkaSection(bootstrap_servers=kafka_server, topic_prefix=names.prefix)
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_server)
    await admin.start()
    try:
        assert set(await topics.create(admin, names, partitions=3)) == set(names.required)
        assert await topics.create(admin, names, partitions=3) == ()
        report = await check(admin, Connection(section), section)
    finally:
        await admin.close()
    assert (report.ok, report.findings) == (True, ())
    assert report.partitions == dict.fromkeys(names.required, 3)
