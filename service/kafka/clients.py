"""The Kafka clients of the service, each with the settings that its duty needs: the one place that knows them.

`connect` gives the arguments that say how to reach the cluster, anew for each client.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import KafkaError

from service.config import KafkaSection
from service.kafka.output import REQUEST_OVERHEAD_BYTES

TRANSACTION_TIMEOUT_MS = 15_000
"""An owner that vanished with a transaction open holds its partition's readers for this long at most."""
_REBALANCE_TIMEOUT_MS = 30_000
_FETCH_WAIT_MS = 100
_EMBEDDED_FETCH_WAIT_MS = 50
"""The in-process broker answers an empty fetch after the whole wait, whatever has come meanwhile: a prompt waits as long."""
_REQUEST_TIMEOUT_MS = 10_000
_RETRY_BACKOFF_MS = 20
_BATCH_BYTES = 65_536
_STOP_S = 5.0

_log = structlog.get_logger(__name__)


async def stop_in_order(*stops: Callable[[], Awaitable[None]] | None) -> None:
    """Ends clients one after another; one that does not end in time is left to itself."""
    for stop in stops:
        if stop is None:
            continue
        try:
            async with asyncio.timeout(_STOP_S):
                await stop()
        except (KafkaError, OSError, TimeoutError) as error:
            _log.info("a Kafka client did not stop in order", error=type(error).__name__)


class Clients:
    """Makes clients; whoever gets one starts and stops it."""

    def __init__(self, section: KafkaSection, connect: Callable[[], dict[str, Any]]) -> None:
        self._section, self._connect = section, connect

    def consumer(self) -> AIOKafkaConsumer:
        """The group's member that takes prompts."""
        section = self._section

        class Assignor(StickyPartitionAssignor):
            """aiokafka keeps the sticky assignor's memory on its class: each consumer has its own."""

        return AIOKafkaConsumer(
            **self._connect(),
            group_id=section.group_id,
            group_instance_id=section.instance_id or None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            # Exactly one: aiokafka joins once an assignor, which breaks the join.
            partition_assignment_strategy=(Assignor,),
            session_timeout_ms=section.session_timeout_ms,
            heartbeat_interval_ms=section.heartbeat_interval_ms,
            rebalance_timeout_ms=_REBALANCE_TIMEOUT_MS,
            max_partition_fetch_bytes=section.max_partition_fetch_bytes,
            # A question about offsets waits behind the fetch before it on the same connection: a hand-over asks two.
            fetch_max_wait_ms=_EMBEDDED_FETCH_WAIT_MS if section.embedded else _FETCH_WAIT_MS,
            # The group's leader leaves a topic out for as long as it has not seen it.
            metadata_max_age_ms=section.topic_refresh_ms,
        )

    def reader(self, *, committed: bool = False) -> AIOKafkaConsumer:
        """Reads partitions that it is given, in no group, from the first record that there is. `committed`: committed ones only."""
        return AIOKafkaConsumer(
            **self._connect(),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed" if committed else "read_uncommitted",
        )

    def producer(self) -> AIOKafkaProducer:
        """Idempotent, acknowledged by all in-sync replicas."""
        return AIOKafkaProducer(
            **self._connect(), enable_idempotence=True, acks="all", max_request_size=self._max_request_bytes
        )

    def transactional(self, transactional_id: str) -> AIOKafkaProducer:
        """A producer of transactions."""
        return AIOKafkaProducer(
            **self._connect(),
            transactional_id=transactional_id,
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            acks="all",
            # One batch of a partition is under way at a time: a transaction's results go in few of them.
            max_batch_size=_BATCH_BYTES,
            max_request_size=self._max_request_bytes,
            request_timeout_ms=_REQUEST_TIMEOUT_MS,
            # The broker answers the first produce of a transaction with "not yet" while it completes the one before (KIP-890).
            retry_backoff_ms=_RETRY_BACKOFF_MS,
        )

    def admin(self) -> AIOKafkaAdminClient:
        """Topics, and the group's progress with its metadata."""
        return AIOKafkaAdminClient(**self._connect())

    @property
    def _max_request_bytes(self) -> int:
        return self._section.max_result_bytes + REQUEST_OVERHEAD_BYTES
