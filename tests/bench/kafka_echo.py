"""What two hops over a broker take without Sluice: a record to a topic, by a bare loop to a second topic, and back to the sender.

The floor of the time to the first token over Kafka (prompt in, chunk out), one record at a time, with aiokafka at both ends as in the
service; taken in the same run as what stands above it.
"""

import asyncio
import time
from dataclasses import asdict
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from service.bench.summary import quantiles

_THERE, _BACK = "echo.there", "echo.back"
_BODY = b"x" * 400
_SETTLE = 20


def two_hops_ms(bootstrap: str, count: int) -> dict[str, Any]:
    """Milliseconds of `count` round trips, after some that do not count."""
    return asyncio.run(_round_trips(bootstrap, count))


async def _reader(bootstrap: str, topic: str) -> AIOKafkaConsumer:
    reader = AIOKafkaConsumer(topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest", enable_auto_commit=False)
    await reader.start()
    return reader


async def _round_trips(bootstrap: str, count: int) -> dict[str, Any]:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(topic, num_partitions=1, replication_factor=1) for topic in (_THERE, _BACK)])
    await admin.close()
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap)
    await producer.start()
    there, back = await _reader(bootstrap, _THERE), await _reader(bootstrap, _BACK)

    async def echo() -> None:
        async for record in there:
            await producer.send(_BACK, record.value)

    echoing = asyncio.create_task(echo())
    took = []
    try:
        for number in range(_SETTLE + count):
            began = time.perf_counter()
            await producer.send(_THERE, _BODY)
            await back.getone()
            if number >= _SETTLE:
                took.append(time.perf_counter() - began)
    finally:
        echoing.cancel()
        await asyncio.gather(echoing, return_exceptions=True)
        for client in (there, back, producer):
            await client.stop()
    found = quantiles(took)
    assert found is not None
    return {name: round(value, 3) for name, value in asdict(found).items()}
