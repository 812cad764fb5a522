"""A Kafka target whose reader has ended."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import KafkaError

from service.bench.kafka_target import KafkaTarget
from service.bench.target import TargetError
from service.bench.workload import Planned
from service.config import KafkaSection
from service.kafka.connection import Connection

PLANNED = Planned(index=0, text="hello there", max_tokens=3, seed=5)


class Producer:
    """Takes records; `sent` is set with the first."""

    def __init__(self) -> None:
        self.sent = asyncio.Event()
        self.num_sent = 0

    async def send_and_wait(self, *_: Any, **__: Any) -> SimpleNamespace:
        self.num_sent += 1
        self.sent.set()
        return SimpleNamespace(topic="prompts", partition=0, offset=self.num_sent)


async def broken(after: asyncio.Event, error: Exception | None) -> AsyncIterator[Any]:
    await after.wait()
    if error is not None:
        raise error
    nothing: tuple[Any, ...] = ()
    for record in nothing:
        yield record


@pytest.mark.parametrize(
    ("error", "said"), [(KafkaError("the group is gone"), "the group is gone"), (None, "nobody reads the results any more")]
)
async def test_once_the_reader_has_ended_requests_fail_at_once(error: Exception | None, said: str) -> None:
    target = KafkaTarget(Connection(KafkaSection(), "127.0.0.1:9"))
    producer: Any = Producer()
    target._producer = producer
    reading = asyncio.create_task(target._read(broken(producer.sent, error)))
    async with asyncio.timeout(10):
        # The first waits for its result; the second has not been sent.
        for num_sent in (1, 1):
            with pytest.raises(TargetError, match=said) as failed:
                await target.ask(PLANNED, lambda num_tokens: None)
            assert (failed.value.code, producer.num_sent) == ("unavailable", num_sent)
        await reading
