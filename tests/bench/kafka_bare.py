"""A bare aiokafka loop as a process of its own: what the client and the broker give when nobody serves prompts.

    python -m tests.bench.kafka_bare --brokers HOST:PORT --group NAME --mode at-least-once|exactly-once

Reads prompt records; for each writes four chunk records of 200 bytes and one result of 800 bytes to the same partition. At least once:
results are acknowledged, then offsets are committed, every 50 ms. Exactly once: a transaction a partition every 50 ms holds the
results and the offset; chunks go through a plain idempotent producer. Runs until SIGTERM.
"""

import argparse
import asyncio
import signal
from collections import defaultdict

import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

TICK_S = 0.05
NUM_CHUNKS, CHUNK, RESULT = 4, b"c" * 200, b"r" * 800
METADATA = "m" * 200


async def serve(brokers: str, group: str, mode: str) -> None:
    consumer = AIOKafkaConsumer(
        "sluice.prompts",
        bootstrap_servers=brokers,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
    )
    plain = AIOKafkaProducer(bootstrap_servers=brokers, enable_idempotence=True)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    transactional: dict[TopicPartition, AIOKafkaProducer] = {}
    ticks: dict[TopicPartition, asyncio.Task[None]] = {}
    results: dict[TopicPartition, int] = defaultdict(int)
    ends: dict[TopicPartition, int] = {}

    async def in_transactions(partition: TopicPartition) -> None:
        producer = transactional[partition]
        while True:
            await asyncio.sleep(TICK_S)
            count, results[partition] = results[partition], 0
            if not count:
                continue
            end = ends[partition]
            async with producer.transaction():
                for _ in range(count):
                    await producer.send("sluice.results", RESULT, partition=partition.partition)
                await producer.send_offsets_to_transaction({partition: (end, METADATA)}, group)

    async def begin(partition: TopicPartition) -> None:
        producer = transactional[partition] = AIOKafkaProducer(
            bootstrap_servers=brokers, transactional_id=f"bare.{group}.{partition.topic}.{partition.partition}"
        )
        await producer.start()
        ticks[partition] = asyncio.create_task(in_transactions(partition))

    async def by_commits() -> None:
        while True:
            await asyncio.sleep(TICK_S)
            points = {partition: (end, METADATA) for partition, end in ends.items()}
            counts = {partition: results.pop(partition) for partition in tuple(results)}
            futures = [
                await plain.send("sluice.results", RESULT, partition=partition.partition)
                for partition, count in counts.items()
                for _ in range(count)
            ]
            if futures:
                await asyncio.wait(futures)
                await consumer.commit(points)

    async with consumer, plain:
        committing = asyncio.create_task(by_commits()) if mode == "at-least-once" else None
        ready = asyncio.create_task(stopping.wait())
        while not stopping.is_set():
            for task in ticks.values():
                if task.done():
                    task.result()
            for partition, records in (await consumer.getmany(timeout_ms=50, max_records=500)).items():
                if mode == "exactly-once" and partition not in transactional:
                    await begin(partition)
                for record in records:
                    for _ in range(NUM_CHUNKS):
                        await plain.send("sluice.chunks", CHUNK, partition=record.partition)
                    results[partition] += 1
                    ends[partition] = record.offset + 1
        for task in (*ticks.values(), committing, ready):
            if task is not None:
                task.cancel()
        await asyncio.gather(*ticks.values(), return_exceptions=True)
        for producer in transactional.values():
            await producer.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brokers", required=True)
    parser.add_argument("--group", required=True)
    parser.add_argument("--mode", choices=("at-least-once", "exactly-once"), required=True)
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.brokers, arguments.group, arguments.mode))


if __name__ == "__main__":
    main()
