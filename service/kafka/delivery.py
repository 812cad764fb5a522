"""Which promise this broker can keep: found out by trying it, not by asking for versions.

Guarantee: `exactly_once` only where an old producer was fenced by a new one of the same transactional id, and the record that its
ended transaction had written stayed hidden from a reader of committed records. (There are brokers that acknowledge transactions and
keep none.)
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from aiokafka import AIOKafkaProducer
from aiokafka import TopicPartition as ClientPartition
from aiokafka.errors import KafkaError, ProducerFenced, TransactionalIdAuthorizationFailed

from service.config import KafkaSection
from service.errors import SetupError
from service.kafka.clients import Clients
from service.kafka.embedded import embedded_cluster
from service.kafka.records import HEADER_TYPE, TopicPartition
from service.kafka.topics import Topics
from service.kafka.transactions import end

PROBE_TYPE = b"probe"
"""`sluice-type` of the record that the probe writes to the dead-letter topic and aborts."""
_TIMEOUT_S = 20.0
_POLL_MS = 100
_TRIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """The promise that is kept, and why not the stronger one ("" when it is)."""

    mode: Literal["exactly_once", "at_least_once"]
    reason: str = ""


def transactional_id(section: KafkaSection, partition: TopicPartition) -> str:
    """One for each input partition of a group."""
    return f"{section.topic_prefix}{section.group_id}.{partition.topic}.{partition.partition}"


async def choose(section: KafkaSection, clients: Clients, topics: Topics) -> Delivery:
    """What `kafka.delivery` comes to on this broker. Raises `SetupError` where it asks for what cannot be, `KafkaError`, `TimeoutError`."""
    if section.delivery == "at_least_once":
        return Delivery(mode="at_least_once", reason="kafka.delivery asks for it")
    if section.embedded or await _embedded(clients):
        reason = "the embedded broker keeps no transactions"
    else:
        name = f"{section.topic_prefix}{section.group_id}.probe"
        try:
            reason = await _tried(lambda: clients.transactional(name), clients, topics)
        except TransactionalIdAuthorizationFailed as error:
            raise SetupError(
                f"these credentials may not use the transactional ids {section.topic_prefix}{section.group_id}.*; "
                "allow it, or set kafka.delivery = at_least_once",
                exit_code=3,
            ) from error
    if not reason:
        return Delivery(mode="exactly_once")
    if section.delivery == "exactly_once":
        raise SetupError(f"kafka.delivery is exactly_once, but {reason}", exit_code=3)
    return Delivery(mode="at_least_once", reason=reason)


async def _embedded(clients: Clients) -> bool:
    """Whether it is the embedded broker of another process, whose topics no reader gets past after a trial's transaction."""
    admin = clients.admin()
    try:
        await admin.start()
        return await embedded_cluster(admin)
    finally:
        await admin.close()


async def _tried(make: Callable[[], AIOKafkaProducer], clients: Clients, topics: Topics) -> str:
    left = _TRIES
    while True:
        left -= 1
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await probe(make, clients, ClientPartition(topics.dead_letters, 0))
        except ProducerFenced:
            # Another replica of the group tries at the same time.
            if not left:
                raise


async def probe(make: Callable[[], AIOKafkaProducer], clients: Clients, partition: ClientPartition) -> str:
    """Why the broker's transactions cannot be relied on; "" when they can. `make` gives producers of one transactional id."""
    old, new = make(), make()
    try:
        await old.start()
        await old.begin_transaction()
        written = await old.send_and_wait(
            partition.topic, b"", key=b"probe", partition=partition.partition, headers=[(HEADER_TYPE, PROBE_TYPE)]
        )
        await new.start()
        try:
            await old.commit_transaction()
        except ProducerFenced:
            pass
        except KafkaError as error:
            return f"the broker ends a replaced producer's transaction with {type(error).__name__} instead of fencing it"
        else:
            return "the broker does not fence a producer that was replaced"
    finally:
        await end(old)
        await end(new)
    if await _shown(clients, partition, written.offset):
        return "the broker shows aborted records to readers of committed ones"
    return ""


async def _shown(clients: Clients, partition: ClientPartition, offset: int) -> bool:
    """Whether a reader of committed records is given the record at `offset`."""
    reader = clients.reader(committed=True)
    try:
        await reader.start()
        reader.assign([partition])
        reader.seek(partition, offset)
        while await reader.position(partition) <= offset:
            for record in (await reader.getmany(partition, timeout_ms=_POLL_MS)).get(partition, []):
                if record.offset == offset:
                    return True
    finally:
        await reader.stop()
    return False
