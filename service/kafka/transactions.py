"""One input partition's transactional producer: fences whoever wrote for it before, and never guesses how a transaction ended.

Guarantees: after `fence` no earlier producer of this id can commit anything, and none of its transactions is open; `commit` returns
only when records and offset are committed together. Whatever goes wrong inside a transaction is final for the producer: `commit`
raises, and nothing more is written until `fence` has given a new one.
That holds for transport errors, too, which aiokafka would retry in silence: a commit delayed on a cut connection could then end a
*later* transaction of the same producer (Jepsen showed it in Kafka itself). A new producer has a new epoch, so the delayed request is
refused. This file alone leans on the client's inside (aiokafka 0.14, pinned): the `send` of its connection, and the futures that
it leaves behind. Knows no prompts; what landed is read back by `committer`'s callers.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka import TopicPartition as ClientPartition
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    ProducerFenced,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.protocol.transaction import (
    AddOffsetsToTxnRequest,
    AddPartitionsToTxnRequest,
    EndTxnRequest,
    TxnOffsetCommitRequest,
)

from service.kafka.records import OutRecord, TopicPartition

_log = structlog.get_logger(__name__)

FENCE_TIMEOUT_S = 30.0
"""An earlier owner's transaction is waited out, at most its time-out."""
COMMIT_TIMEOUT_S = 10.0
_STOP_S = 2.0

_INSIDE = (ProduceRequest, AddPartitionsToTxnRequest, AddOffsetsToTxnRequest, TxnOffsetCommitRequest, EndTxnRequest)
_RECORDS_OWN = (
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)


class LostError(Exception):
    """The producer is gone, and whether its last transaction landed is not known. `fenced`: by another producer of its id."""

    def __init__(self, reason: BaseException | str, *, fenced: bool = False) -> None:
        super().__init__(str(reason) or type(reason).__name__)
        self.fenced = fenced


class RefusedError(Exception):
    """A record was not taken for a reason of its own, so nothing of its transaction was.

    `num_taken`: records before it that were. `too_large`: a smaller one would be taken.
    """

    def __init__(self, num_taken: int, error: BaseException) -> None:
        super().__init__(type(error).__name__)
        self.num_taken = num_taken
        self.too_large = isinstance(error, MessageSizeTooLargeError | RecordListTooLargeError)


class _TransportLostError(Exception):
    """No `KafkaError`: aiokafka retries those."""


class Transactions:
    """The transactions of one transactional id, one at a time. `make` gives a fresh, not yet started producer."""

    def __init__(self, make: Callable[[], AIOKafkaProducer], *, group_id: str) -> None:
        self._make = make
        self._group_id = group_id
        self._producer: AIOKafkaProducer | None = None

    @property
    def usable(self) -> bool:
        """Whether `commit` may be called."""
        return self._producer is not None

    async def fence(self) -> None:
        """Starts anew: every earlier producer of this id is fenced, its open transaction ended. Raises `KafkaError`, `TimeoutError`."""
        await self.close()
        producer = self._make()
        try:
            async with asyncio.timeout(FENCE_TIMEOUT_S):
                await producer.start()
        except BaseException:
            await end(producer)
            raise
        _never_retry(producer)
        self._producer = producer

    async def commit(
        self,
        partition: TopicPartition,
        records: Sequence[OutRecord],
        point: tuple[int, str],
        timeout_s: float = COMMIT_TIMEOUT_S,
    ) -> Sequence[int]:
        """Writes `records` and commits `point`, both or neither; gives the records' offsets.

        Raises `LostError` or `RefusedError`; either ends this producer.
        """
        producer = self._producer
        if producer is None:
            raise LostError("there is no producer now")
        try:
            async with asyncio.timeout(timeout_s):
                offsets = await self._commit(producer, ClientPartition(*partition), records, point)
        except (KafkaError, TimeoutError, _TransportLostError, OSError) as error:
            raise LostError(error, fenced=isinstance(error, ProducerFenced)) from error
        except AssertionError as error:
            # The client's own state machine: it has met a fatal error before us.
            raise LostError("the producer had failed") from error
        else:
            producer = None
            return offsets
        finally:
            # A cancelled commit, too, leaves nobody who knows how it ended.
            if producer is not None:
                self._producer = None
                await end(producer)

    async def close(self) -> None:
        """Gives the producer up; an open transaction is left to whoever fences next. Idempotent."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await end(producer)

    async def _commit(
        self, producer: AIOKafkaProducer, partition: ClientPartition, records: Sequence[OutRecord], point: tuple[int, str]
    ) -> Sequence[int]:
        await producer.begin_transaction()
        futures: list[asyncio.Future[Any]] = []
        try:
            for index, record in enumerate(records):
                try:
                    futures.append(await _send(producer, record))
                except _RECORDS_OWN as error:
                    raise RefusedError(index, error) from error
            offsets = asyncio.ensure_future(producer.send_offsets_to_transaction({partition: point}, self._group_id))
            answers = await asyncio.gather(*futures, offsets, return_exceptions=True)
        finally:
            for future in futures:
                # Nobody else asks those that are still open.
                future.add_done_callback(_seen)
        for index, answer in enumerate(answers):
            if isinstance(answer, _RECORDS_OWN) and index < len(records):
                raise RefusedError(index, answer) from answer
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        await producer.commit_transaction()
        return [future.result().offset for future in futures]


async def _send(producer: AIOKafkaProducer, record: OutRecord) -> "asyncio.Future[Any]":
    if record.partition is not None and record.partition not in await producer.partitions_for(record.topic):
        # The client would assert. The prompts' topic may grow before the others do.
        producer.client.force_metadata_update()
        raise UnknownTopicOrPartitionError(f"{record.topic} has no partition {record.partition}")
    future: asyncio.Future[Any] = await producer.send(
        record.topic, record.value, key=record.key, partition=record.partition, headers=list(record.headers)
    )
    return future


def _never_retry(producer: AIOKafkaProducer) -> None:
    """Makes every transport error of a transaction's own requests end the producer."""
    send = producer.client.send

    async def once(node_id: int, request: Any, **options: Any) -> Any:
        try:
            return await send(node_id, request, **options)
        except KafkaError as error:
            if isinstance(request, ProduceRequest):
                # Fails the batch instead of the sender: several of these may be under way, and none is to be left unheard.
                raise _NotRetriedError(type(error).__name__) from error
            if isinstance(request, _INSIDE):
                raise _TransportLostError(type(error).__name__) from error
            raise

    producer.client.send = once


class _NotRetriedError(KafkaConnectionError):
    """A transport error that the client must not retry."""

    retriable = False


async def end(producer: AIOKafkaProducer) -> None:
    """Ends a producer at once: nothing leaves it any more, an open transaction stays open. (Its own `stop` waits for what is unsent.)"""

    async def closed(node_id: int, request: Any, **options: Any) -> Any:
        raise _NotRetriedError("the producer is closed")

    producer.client.send = closed
    transactions = producer._txn_manager
    if transactions is not None and (ending := transactions.wait_for_transaction_end()) is not None:
        ending.add_done_callback(_seen)
    ends = {asyncio.ensure_future(producer.client.close())}
    if (sender := producer._sender.sender_task) is not None:
        sender.cancel()
        ends.add(sender)
    for end in ends:
        end.add_done_callback(_seen)
    producer._closed = True
    await asyncio.wait(ends, timeout=_STOP_S)
    # The sender may have opened a connection in between.
    again = asyncio.ensure_future(producer.client.close())
    again.add_done_callback(_seen)
    await asyncio.wait({again}, timeout=_STOP_S)


def _seen(future: "asyncio.Future[Any]") -> None:
    if not future.cancelled():
        future.exception()
