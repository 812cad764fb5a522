"""Which open partitions may be read now, and in which order: those whose class is within its budget, whose window has room and whose
next record can be read, by the weights of their classes. The others are paused.

Owner of what is paused.
"""

from collections.abc import Callable, Mapping

from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as ClientPartition

from service.kafka.budget import IntakeBudget, QueueClass
from service.kafka.ownership import OwnedPartition, Partitions
from service.kafka.records import InRecord, TopicPartition
from service.kafka.topics import WEIGHTS, turns
from service.kafka.unreadable import Unreadable
from service.telemetry.metrics import KafkaMetrics


class Intake:
    """`polling` False: nothing is taken any more. `paused`: open partitions that are held back now."""

    def __init__(
        self,
        *,
        partitions: Partitions,
        budget: IntakeBudget,
        classes: Mapping[str, QueueClass],
        unreadable: Unreadable,
        engine_alive: Callable[[], bool],
        metrics: KafkaMetrics,
    ) -> None:
        self._partitions, self._budget, self._classes = partitions, budget, classes
        self._unreadable, self._engine_alive, self._metrics = unreadable, engine_alive, metrics
        self.polling = True
        self.paused: set[TopicPartition] = set()

    def readable(self, consumer: AIOKafkaConsumer) -> list[TopicPartition]:
        """The open partitions that may be read now, in the order of their turns; pauses and resumes by the way."""
        readable = []
        for owned in self._partitions:
            if owned.state != "open":
                continue
            if self._may_read(owned):
                readable.append(owned.partition)
                if owned.partition in self.paused:
                    self.paused.discard(owned.partition)
                    consumer.resume(ClientPartition(*owned.partition))
            elif owned.partition not in self.paused:
                self.paused.add(owned.partition)
                consumer.pause(ClientPartition(*owned.partition))
            self._metrics.window(*owned.partition, owned.tracker.used)
        self._metrics.intake(tokens=self._budget.used, paused_partitions=len(self.paused))
        return turns({partition: WEIGHTS[self._classes[partition.topic]] for partition in readable})

    def _may_read(self, owned: OwnedPartition) -> bool:
        if not self.polling or not self._engine_alive() or not self._budget.open(self._classes[owned.partition.topic]):
            return False
        if self._unreadable.holds(owned.partition) or self._partitions.holds(owned.partition):
            return False
        if owned.partition in self.paused:
            return owned.tracker.used <= owned.tracker.window // 2
        return not owned.tracker.full

    def may_take(self, owned: OwnedPartition, record: InRecord) -> bool:
        """Whether this record may be taken now."""
        in_budget = self.polling and self._budget.open(self._classes[owned.partition.topic])
        return in_budget and owned.tracker.fits(record.offset)
