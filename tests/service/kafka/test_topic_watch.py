"""The topics that a replica follows, with a broker that tells another identity than what the replica works on was opened under."""

import asyncio
from collections.abc import Mapping
from typing import Any

from service.kafka.ownership import OwnedPartition, Partitions
from service.kafka.records import TopicPartition
from service.kafka.topic_watch import TopicWatch
from service.kafka.topics import Topics
from service.kafka.tracker import PartitionTracker
from tests.service.kafka.fakes import until

PROMPTS, BATCH = "t.prompts", "t.prompts.batch"


class FakeBroker:
    """Tells these identities."""

    def __init__(self, **identities: str) -> None:
        self.identities = identities
        self.num_looks = 0

    async def _send_request(self, request: object) -> Any:
        self.num_looks += 1
        return self

    def to_object(self) -> dict[str, Any]:
        topics = {PROMPTS: self.identities["prompts"], BATCH: self.identities["batch"]}
        one = [{"leader": 1}]
        return {
            "topics": [{"topic": name, "topic_id": which, "error_code": 0, "partitions": one} for name, which in topics.items()]
        }


def held(partitions: Partitions, topic: str, topic_id: str) -> OwnedPartition:
    owned = OwnedPartition(TopicPartition(topic, 0), PartitionTracker(low=2, epoch=1, topic_id=topic_id))
    partitions.put(owned)
    return owned


async def test_a_topic_made_anew_before_the_first_look_is_told_once() -> None:
    broker: Any = FakeBroker(prompts="p1", batch="b2")
    partitions = Partitions()
    held(partitions, PROMPTS, "p1")
    batch = held(partitions, BATCH, "b1")
    told: list[Mapping[str, str]] = []

    async def change(found: Mapping[str, str]) -> None:
        told.append(found)
        partitions.retire(batch.partition)

    watch = TopicWatch(Topics("t."), lambda: broker, partitions, refresh_s=0.001)
    following = asyncio.create_task(watch.follow({PROMPTS: "", BATCH: ""}, change))
    try:
        await until(lambda: broker.num_looks >= 6)
    finally:
        following.cancel()
    assert told == [{PROMPTS: "p1", BATCH: "b2"}]
