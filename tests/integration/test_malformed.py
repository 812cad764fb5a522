"""Five thousand malformed records against a real replica: each has a typed end that names the fault; the sound ones stay as they were."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from tests.integration.app_harness import serve, values
from tests.integration.kafka_harness import Broker
from tests.integration.malformed import Malformed, records
from tests.integration.test_bad_input import read

pytestmark = pytest.mark.kafka

SEED, TOTAL, ROUND, CONTEXT = 20261125, 5_000, 500, 256
CANARIES = tuple(
    json.dumps({"prompt": text, "sampling": {"max_tokens": 12, "seed": 5, "temperature": heat, "ignore_eos": True}}).encode()
    for text, heat in (("canary one", 0.0), ("canary two", 0.9))
)
MAX_GROWTH_BYTES = 32 * 2**20


class Reader:
    """All of a topic from its beginning, as it comes."""

    def __init__(self, broker: Broker, topic: str) -> None:
        self._consumer = Consumer({"bootstrap.servers": broker.bootstrap, "group.id": "unused", "enable.auto.commit": False})
        self._consumer.assign([TopicPartition(topic, partition, 0) for partition in range(broker.partitions)])

    def take(self, count: int) -> list[Any]:
        """The next `count` records. Fails when none comes for 60 s."""
        found: list[Any] = []
        while len(found) < count:
            more = self._consumer.consume(count - len(found), 60.0)
            assert more, f"{len(found)} of {count} records came"
            assert all(record.error() is None for record in more)
            found += more
        return found

    def close(self) -> None:
        self._consumer.close()


def publish(broker: Broker, producer: Producer, batch: list[Malformed | bytes]) -> dict[tuple[int, int], Malformed | bytes]:
    """Writes a batch over the partitions in turn; what stands where."""
    stands: dict[tuple[int, int], Malformed | bytes] = {}
    for index, one in enumerate(batch):
        value, headers = (one, {}) if isinstance(one, bytes) else (one.value, one.headers)

        def written(error: Any, record: Any, one: Malformed | bytes = one) -> None:
            assert error is None
            stands[record.partition(), record.offset()] = one

        producer.produce(
            broker.topics.prompts, value, partition=index % broker.partitions, headers=dict(headers), on_delivery=written
        )
        producer.poll(0)
    assert producer.flush(60) == 0
    return stands


def place(body: dict[str, Any]) -> tuple[int, int]:
    return int(body["source"].get("partition", 0)), int(body["source"].get("offset", 0))


def wrong(expected: Malformed, error: dict[str, Any]) -> str:
    """What is not as it must be; "" when all is."""
    named = expected.names in error.get("field", "") or expected.names in error["message"]
    return (
        ""
        if named and error["code"] == expected.code
        else f"{expected.kind} {expected.value[:60]!r} {expected.headers}: {error}"
    )


async def test_each_malformed_record_ends_typed_and_named_and_the_canaries_stay_identical(
    tiny_model_dir: Path, topics_of_its_own: Broker
) -> None:
    broker = topics_of_its_own
    made: Iterator[Malformed] = records(SEED, context=CONTEXT)
    producer = Producer({"bootstrap.servers": broker.bootstrap, "linger.ms": 5, "log_level": 0})
    results, letters = Reader(broker, broker.topics.results), Reader(broker, broker.topics.dead_letters)
    kinds: Counter[str] = Counter()
    songs: list[list[str]] = []
    sizes: list[int] = []
    config = values(tiny_model_dir, broker=broker, engine={"stand_in_max_model_len": CONTEXT})
    async with serve(config) as sluice:
        for _ in range(TOTAL // ROUND):
            batch = list(islice(made, ROUND))
            stands = await asyncio.to_thread(publish, broker, producer, [*batch, *CANARIES])
            kinds.update(one.kind for one in batch)
            ended = {place(body): body for body in map(read, await asyncio.to_thread(results.take, len(stands)))}
            assert ended.keys() == stands.keys()
            faults = {spot: one for spot, one in stands.items() if isinstance(one, Malformed)}
            assert [found for spot, one in faults.items() if (found := wrong(one, ended[spot]["error"]))] == []
            dead = {
                place(body): body
                for record in await asyncio.to_thread(letters.take, ROUND)
                if (body := json.loads(record.value()))
            }
            assert {spot: body["error"]["code"] for spot, body in dead.items()} == {
                spot: one.code for spot, one in faults.items()
            }
            songs.append([ended[spot]["choices"][0]["text"] for spot, one in sorted(stands.items()) if isinstance(one, bytes)])
            sizes.append(psutil.Process(sluice.pid).memory_info().rss)
        assert (await sluice.child()).is_running()
    results.close()
    letters.close()
    assert songs == [songs[0]] * (TOTAL // ROUND)
    assert min(kinds.values()) >= TOTAL // len(kinds) - 1
    # What is loaded once (codecs, the first requests of each kind) is there after the first round.
    assert max(sizes) - sizes[0] <= MAX_GROWTH_BYTES
