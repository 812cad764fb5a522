"""How far behind the partitions of this replica are, for the metrics; asking for it is also the sign that the broker answers."""

import asyncio
from collections.abc import Callable

from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as ClientPartition
from aiokafka.errors import KafkaError

from service.kafka.backlog import Backlog
from service.kafka.ownership import Partitions
from service.telemetry.metrics import KafkaMetrics

_ANSWER_S = 2.0


class Lag:
    """Asks for the ends of the open partitions."""

    def __init__(self, partitions: Partitions, backlog: Backlog, metrics: KafkaMetrics, *, wall_ns: Callable[[], int]) -> None:
        self._partitions, self._backlog, self._metrics = partitions, backlog, metrics
        self._wall_ns = wall_ns

    async def measure(self, consumer: AIOKafkaConsumer) -> bool | None:
        """Whether the broker answers; None when there was nothing to ask it, or it cannot know."""
        partitions = [owned for owned in self._partitions if owned.state == "open"]
        if not partitions:
            return None
        try:
            # Not `wait_for`, which before Python 3.12 loses a cancellation that comes together with the answer.
            async with asyncio.timeout(_ANSWER_S):
                ends = await consumer.end_offsets([ClientPartition(*owned.partition) for owned in partitions])
        except (KafkaError, TimeoutError):
            # Of a topic that was deleted the client has lost sight meanwhile: no broker answers for it.
            there = all(consumer.partitions_for_topic(owned.partition.topic) for owned in partitions)
            return False if there else None
        now_ms = self._wall_ns() // 1_000_000
        for owned in partitions:
            if owned.state != "lost":
                end = ends[ClientPartition(*owned.partition)]
                age_s = self._backlog.seconds(owned.partition, next_offset=owned.tracker.next_offset, end=end, now_ms=now_ms)
                self._metrics.lag(*owned.partition, max(end - owned.tracker.low, 0), age_s)
        return True
