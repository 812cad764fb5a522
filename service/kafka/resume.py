"""What earlier owners of a partition had said of its unfinished prompts, read back from the chunk topic.

Guarantees: reads every record from the committed `chunk_low` to the topic's end as it is now, and decodes only those of prompts that
are not done. Where an owner may still be handing over (a rebalance, no crash), its marks are waited for a moment: what it said last
need not be said again. Only an optimisation: a late record of an earlier epoch does no harm.
"""

import asyncio
from collections.abc import Callable

from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as ClientPartition

from service.kafka.chunk_records import Said, offset_of, read_chunk_record
from service.kafka.records import InRecord, TopicPartition

HANDOVER_WAIT_S = 0.3
"""An owner that lives hands over within some milliseconds of a rebalance."""
_POLL_MS = 50
_MAX_RECORDS = 1_000


class ChunkReading:
    """Reads with consumers of its own, one an opening. `make` gives one that is not started, in no group."""

    def __init__(self, make: Callable[[], AIOKafkaConsumer], topic: str, *, wait_s: float = HANDOVER_WAIT_S) -> None:
        self._make, self._topic, self._wait_s = make, topic, wait_s

    def partition(self, of: TopicPartition) -> ClientPartition:
        """The partition of the chunk topic that the prompts of `of` speak on."""
        return ClientPartition(self._topic, of.partition)

    async def end(self, partition: TopicPartition) -> int:
        """Where a partition ends, records that are not committed yet included. Raises `KafkaError`."""
        asked, consumer = ClientPartition(*partition), self._make()
        try:
            await consumer.start()
            return int((await consumer.end_offsets([asked]))[asked])
        finally:
            await consumer.stop()

    async def unfinished(
        self, of: TopicPartition, is_done: Callable[[int], bool], *, begin: int, end: int
    ) -> tuple[dict[int, Said], int]:
        """What was said of each prompt that is not done, by offset, and how far was read. Raises `KafkaError`, `TimeoutError`."""
        found: dict[int, Said] = {}
        if begin >= end:
            return found, end
        consumer = self._make()
        partition = self.partition(of)
        try:
            await consumer.start()
            consumer.assign([partition])
            consumer.seek(partition, begin)
            position = await self._read(consumer, partition, of, is_done, found, end)
        finally:
            await consumer.stop()
        return found, position

    async def _read(
        self,
        consumer: AIOKafkaConsumer,
        partition: ClientPartition,
        of: TopicPartition,
        is_done: Callable[[int], bool],
        found: dict[int, Said],
        end: int,
    ) -> int:
        loop = asyncio.get_running_loop()
        position, until_s = 0, 0.0
        while True:
            records = (await consumer.getmany(partition, timeout_ms=_POLL_MS, max_records=_MAX_RECORDS)).get(partition, [])
            for record in records:
                _feed(record, of, is_done, found)
            position = await consumer.position(partition)
            # Decoding holds the loop: others' turn.
            await asyncio.sleep(0)
            if position < end:
                continue
            if until_s == 0.0:
                until_s = loop.time() + self._wait_s
            if loop.time() >= until_s or all(said.handed_over for said in found.values()):
                return max(position, end)


def _feed(record: InRecord, of: TopicPartition, is_done: Callable[[int], bool], found: dict[int, Said]) -> None:
    offset = offset_of(record.key, of.topic, of.partition)
    if offset < 0 or is_done(offset):
        return
    message = read_chunk_record(record)
    if message is None:
        return
    if offset not in found:
        found[offset] = Said(first_offset=record.offset)
    found[offset].feed(message)
