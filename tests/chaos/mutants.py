"""Faults of the commit protocol, planted in a replica's process: what the history checker has to catch.

Each changes one thing that the protocol promises, and widens the window in which that matters, so that a short run meets it; `faults` are
the ones that bring it out. `tests/chaos/hunt.py` runs them; `planted.py` plants them. They patch classes of the product by name: when
one is renamed, its mutant fails at its start and says so.
"""

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.chaos.plan import Fault

WINDOW_S = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """`breaks`: the checker's rules of which at least one has to fire."""

    what: str
    plant: Callable[[], None]
    breaks: tuple[str, ...]
    faults: tuple[Fault, ...]


BARRIERS = (Fault(at_s=6.0, kind="barrier"),)
STOPS = tuple(Fault(at_s=at_s, kind="term", target=number) for number, at_s in enumerate((3.0, 6.0)))
PAUSES = tuple(Fault(at_s=at_s, kind="pause", target=number, for_s=5.0) for number, at_s in enumerate((3.0, 7.0)))
LOST_ANSWERS = tuple(Fault(at_s=at_s, kind="lost-answer", for_s=1.0) for at_s in (3.0, 5.0, 7.0))
LATE_COMMITS = tuple(Fault(at_s=3.0 + 0.8 * number, kind="late-commit", for_s=0.7, amount=0.25) for number in range(8))
# The broker hears of these so late that another producer has taken over: they are never committed.
DROPPED_COMMITS = tuple(Fault(at_s=at_s, kind="late-commit", for_s=1.0, amount=6.0) for at_s in (3.0, 5.0, 7.0, 9.0, 11.0))


async def _in_one(transactions: Any, producer: Any, records: Any, offsets: Any) -> list[int]:
    """One transaction of these records and offsets; where the records stand."""
    from service.kafka import transactions as module

    await producer.begin_transaction()
    futures = [await module._send(producer, record) for record in records]
    if futures:
        await asyncio.wait(futures)
    if offsets is not None:
        await producer.send_offsets_to_transaction(offsets, transactions._group_id)
    await producer.commit_transaction()
    return [future.result().offset for future in futures]


def _offsets_after_the_transaction() -> None:
    from service.kafka.transactions import Transactions

    async def commit(self: Any, producer: Any, partition: Any, records: Any, point: Any) -> list[int]:
        written = await _in_one(self, producer, records, None)
        await asyncio.sleep(WINDOW_S)
        await _in_one(self, producer, (), {partition: point})
        return written

    Transactions._commit = commit  # type: ignore[method-assign]


def _offsets_before_the_transaction() -> None:
    from service.kafka.transactions import Transactions

    async def commit(self: Any, producer: Any, partition: Any, records: Any, point: Any) -> list[int]:
        await _in_one(self, producer, (), {partition: point})
        await asyncio.sleep(WINDOW_S)
        return await _in_one(self, producer, records, None)

    Transactions._commit = commit  # type: ignore[method-assign]


def _dead_letter_outside_the_transaction() -> None:
    from service.kafka.transactions import Transactions

    async def commit(self: Any, producer: Any, partition: Any, records: Any, point: Any) -> list[int]:
        letters = [record for record in records if record.topic.endswith("dlq")]
        others = [record for record in records if record not in letters]
        at: dict[int, int] = {}
        if letters:
            at |= dict(zip(map(id, letters), await _in_one(self, producer, letters, None), strict=True))
            await asyncio.sleep(WINDOW_S)
        at |= dict(zip(map(id, others), await _in_one(self, producer, others, {partition: point}), strict=True))
        return [at[id(record)] for record in records]

    Transactions._commit = commit  # type: ignore[method-assign]


def _lost_answer_taken_for_failure() -> None:
    from service.kafka.transactional import _Lane

    asked = _Lane._recovered

    async def recovered(self: Any, number: int) -> bool | None:
        landed = await asked(self, number)
        if landed:
            self._owned.tracker.committed()
        return None if landed is None else False

    _Lane._recovered = recovered  # type: ignore[method-assign]


def _lost_answer_taken_for_success() -> None:
    from service.kafka.transactional import _Lane

    asked = _Lane._recovered

    async def recovered(self: Any, number: int) -> bool | None:
        landed = await asked(self, number)
        if landed is False:
            # The count goes on as if it had been written.
            self._owned.tracker.commits -= 1
        return None if landed is None else True

    _Lane._recovered = recovered  # type: ignore[method-assign]


def _no_new_producer_after_a_transport_error() -> None:
    from service.kafka import transactions as module

    async def commit(self: Any, producer: Any, partition: Any, records: Any, point: Any) -> list[int]:
        # A transaction after another, with time in the middle for a late request of the one before.
        half = (len(records) + 1) // 2
        await producer.begin_transaction()
        futures = [await module._send(producer, record) for record in records[:half]]
        if futures:
            await asyncio.wait(futures)
        await asyncio.sleep(WINDOW_S)
        futures += [await module._send(producer, record) for record in records[half:]]
        if futures:
            await asyncio.wait(futures)
        await producer.send_offsets_to_transaction({partition: point}, self._group_id)
        await producer.commit_transaction()
        return [future.result().offset for future in futures]

    module._never_retry = lambda producer: None  # type: ignore[assignment]
    module.Transactions._commit = commit  # type: ignore[method-assign]


def _frontier_past_an_unfinished_offset() -> None:
    from service.kafka.tracker import PartitionTracker, Progress, encode

    def commit_point(self: Any, *also: int) -> tuple[int, str]:
        return self.next_offset, encode(Progress(epoch=self.epoch, next_offset=self.next_offset, commits=self.commits + 1))

    PartitionTracker.commit_point = commit_point  # type: ignore[method-assign]


def _done_bits_dropped_on_rebalance() -> None:
    from service.kafka import assignment

    bounded = assignment._bounded

    def without(*arguments: Any) -> tuple[int, int]:
        return bounded(*arguments)[0], 0

    assignment._bounded = without


def _commit_after_revoke() -> None:
    """No fencing of the owner before, and a partition is written for whatever the group says."""
    from service.kafka import clients
    from service.kafka.ownership import OwnedPartition

    # Longer than any pause: nothing but fencing would end what a halted owner has open.
    clients.TRANSACTION_TIMEOUT_MS = 30_000
    transactional = clients.Clients.transactional

    def unfenced(self: Any, transactional_id: str) -> Any:
        # The trial of the broker's transactions at start is left as it is: it would choose at-least-once delivery.
        own = transactional_id if transactional_id.endswith(".probe") else f"{transactional_id}.{uuid.uuid4().hex}"
        return transactional(self, own)

    async def may_write(self: Any) -> bool:
        return True

    def lose(self: Any) -> None:
        """Goes on to the end."""

    clients.Clients.transactional = unfenced  # type: ignore[method-assign]
    OwnedPartition.may_write = may_write  # type: ignore[method-assign]
    OwnedPartition.lose = lose  # type: ignore[method-assign]


def _exit_before_commit() -> None:
    """A stopping replica commits the offsets of what runs, and ends before the results."""
    import os

    from service.kafka.completion import Completion
    from service.kafka.transport import KafkaTransport

    async def drain(self: Any, grace_s: float) -> bool:
        for owned in self._partitions:
            for offset in owned.tracker.running:
                empty = Completion(
                    owned=owned, offset=offset, records=(), replacement=lambda num_taken: (), settled=lambda durable: None
                )
                self._commits.submit(empty)
        await self._commits.flush(5.0)
        os._exit(0)

    KafkaTransport.drain = drain  # type: ignore[method-assign]


def _done_when_taken() -> None:
    from service.kafka.tracker import PartitionTracker

    commit_point = PartitionTracker.commit_point

    def eager(self: Any, *also: int) -> tuple[int, str]:
        return commit_point(self, *self.running)

    PartitionTracker.commit_point = eager  # type: ignore[method-assign]


def _epoch_used_twice() -> None:
    from service.kafka import assignment

    tracker = assignment.PartitionTracker

    def same(*, epoch: int, **options: Any) -> Any:
        return tracker(epoch=max(epoch - 1, 1), **options)

    assignment.PartitionTracker = same  # type: ignore[assignment,misc]


def _resumed_one_token_back() -> None:
    """The last token is drawn again, and the readers are not told."""
    from dataclasses import replace

    from service.kafka.chunks import ChunkWriter
    from service.kafka.handler import PromptHandler

    call, begin = PromptHandler._call, ChunkWriter.open

    def one_less(self: Any, *arguments: Any) -> Any:
        made = call(self, *arguments)
        return replace(made, said=tuple(tokens[:-1] for tokens in made.said))

    def claimed(self: Any, *arguments: Any, resume_from: Any = (0,), **options: Any) -> Any:
        return begin(self, *arguments, resume_from=tuple(count + 1 if count else 0 for count in resume_from), **options)

    PromptHandler._call = one_less  # type: ignore[method-assign]
    ChunkWriter.open = claimed  # type: ignore[method-assign]


def _progress_remembered() -> None:
    """A partition that comes back starts from what this replica knew of it."""
    from service.kafka import membership

    progress = membership.progress
    known: dict[Any, Any] = {}

    async def remembered(admin: Any, group_id: str, partition: Any) -> Any:
        if partition not in known:
            known[partition] = await progress(admin, group_id, partition)
        return known[partition]

    membership.progress = remembered


MUTANTS: dict[str, Mutant] = {
    "offsets-after-the-transaction": Mutant(
        what="results are committed first, offsets in a transaction of their own",
        plant=_offsets_after_the_transaction,
        breaks=("torn", "duplicate"),
        faults=BARRIERS,
    ),
    "offsets-before-the-transaction": Mutant(
        what="offsets are committed first, results in a transaction of their own",
        plant=_offsets_before_the_transaction,
        breaks=("torn", "lost"),
        faults=BARRIERS,
    ),
    "dead-letter-outside-the-transaction": Mutant(
        what="dead letters are committed before the result and the offset",
        plant=_dead_letter_outside_the_transaction,
        breaks=("torn", "dead_letter"),
        faults=BARRIERS,
    ),
    "lost-answer-taken-for-failure": Mutant(
        what="a commit whose answer was lost is done again without asking whether it landed",
        plant=_lost_answer_taken_for_failure,
        breaks=("duplicate",),
        faults=LOST_ANSWERS,
    ),
    "lost-answer-taken-for-success": Mutant(
        what="a commit whose answer was lost is believed to have landed",
        plant=_lost_answer_taken_for_success,
        breaks=("lost",),
        faults=DROPPED_COMMITS,
    ),
    "no-new-producer-after-a-transport-error": Mutant(
        what="the client retries inside a transaction, so that a late commit ends a later one",
        plant=_no_new_producer_after_a_transport_error,
        breaks=("torn", "duplicate", "lost", "dead_letter"),
        faults=(*LATE_COMMITS, *BARRIERS),
    ),
    "frontier-past-an-unfinished-offset": Mutant(
        what="the newest offset taken is committed",
        plant=_frontier_past_an_unfinished_offset,
        breaks=("torn", "lost"),
        faults=BARRIERS,
    ),
    "done-bits-dropped-on-rebalance": Mutant(
        what="a new owner forgets what was done above the committed offset",
        plant=_done_bits_dropped_on_rebalance,
        breaks=("duplicate", "regressed"),
        faults=BARRIERS,
    ),
    "commit-after-revoke": Mutant(
        what="an owner that was replaced is not fenced and goes on writing",
        plant=_commit_after_revoke,
        breaks=("duplicate", "regressed"),
        faults=PAUSES,
    ),
    "exit-before-commit": Mutant(
        what="a stopping replica commits the offsets of what runs, and ends before the results",
        plant=_exit_before_commit,
        breaks=("lost", "torn"),
        faults=STOPS,
    ),
    "done-when-taken": Mutant(
        what="progress covers what runs",
        plant=_done_when_taken,
        breaks=("lost", "torn"),
        faults=BARRIERS,
    ),
    "epoch-used-twice": Mutant(
        what="a new owner speaks under its predecessor's epoch",
        plant=_epoch_used_twice,
        breaks=("chunks",),
        faults=PAUSES,
    ),
    "resumed-one-token-back": Mutant(
        what="a new owner says the last token again without telling the readers",
        plant=_resumed_one_token_back,
        breaks=("chunks",),
        faults=BARRIERS,
    ),
    "progress-remembered": Mutant(
        what="a partition that comes back starts from what this replica knew of it",
        plant=_progress_remembered,
        breaks=("duplicate", "regressed"),
        faults=(*STOPS, *PAUSES),
    ),
}
