"""Terminal records and offsets: the one place that knows in which order they become durable, which makes this at least once.

Guarantees: an offset is done only after every terminal record of its prompt is acknowledged; `(low, metadata)` is committed every
`interval_s` while there is something new, at once when idle; nothing is written or committed for a partition that is not `open`.
A crash between the acknowledgement and the commit redelivers the prompt: its terminal record may then come twice, with the same
request id. A transaction a partition would go here, and nowhere else.
Bounded by the intake: a record's tokens are released only once it is durable.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import structlog
from aiokafka.errors import IllegalStateError, KafkaError

from service.errors import RequestError
from service.kafka.output import Output
from service.kafka.ownership import OwnedPartition
from service.kafka.records import OutRecord, TopicPartition

_log = structlog.get_logger(__name__)

_RETRY_S = 0.2
_RETRY_MAX_S = 5.0
COMMIT_TIMEOUT_S = 5.0


class Offsets(Protocol):
    """Where progress is committed."""

    async def commit(self, points: Mapping[TopicPartition, tuple[int, str]]) -> None:
        """Commits (low, metadata) of each partition. Raises `KafkaError` when the group did not take it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A prompt that has ended. `records`: its terminal records, empty for a tombstone.

    `replacement` is asked when one of these is refused for its size: told how many are durable by then, it gives what to write in
    place of the rest. `settled` is called once: True when the records are durable and the offset is done, False when the partition
    was lost before.
    """

    owned: OwnedPartition
    offset: int
    records: tuple[OutRecord, ...]
    replacement: Callable[[int], tuple[OutRecord, ...]]
    settled: Callable[[bool], None]


class Committer:
    """Writes completions and commits offsets. `run` is its task; `flush` ends a drain."""

    def __init__(
        self,
        output: Output,
        offsets: Offsets,
        *,
        interval_s: float,
        on_commit: Callable[[Mapping[TopicPartition, tuple[int, str]], bool], None] = lambda points, ok: None,
    ) -> None:
        """`on_commit` hears of each commit, and whether it was taken."""
        self._output = output
        self._offsets = offsets
        self._interval_s = interval_s
        self._on_commit = on_commit
        self._writes: set[asyncio.Task[None]] = set()
        self._dirty: dict[OwnedPartition, None] = {}
        self._wake = asyncio.Event()
        self._commit_lock = asyncio.Lock()

    @property
    def num_unwritten(self) -> int:
        """Completions whose records are not acknowledged yet."""
        return len(self._writes)

    def submit(self, completion: Completion) -> None:
        """Takes a completion over; never waits."""
        task = asyncio.create_task(self._write(completion), name="write terminal record")
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def run(self) -> None:
        """Commits until cancelled."""
        pause_s = self._interval_s
        while True:
            await self._wake.wait()
            self._wake.clear()
            if await self.commit():
                pause_s = self._interval_s
            else:
                pause_s = min(max(pause_s, _RETRY_S) * 2, _RETRY_MAX_S)
                self._wake.set()
            await asyncio.sleep(pause_s)

    async def commit(self, timeout_s: float = COMMIT_TIMEOUT_S) -> bool:
        """Commits what is done now; False when the broker did not take it (it stays to be committed)."""
        async with self._commit_lock:
            chosen = [owned for owned in self._dirty if owned.state == "open"]
            # What is lost is its new owner's to commit; what is tentative waits for its state.
            self._dirty = {owned: None for owned in self._dirty if owned.state in ("opening", "tentative")}
            if not chosen:
                return True
            points = {owned.partition: owned.tracker.commit_point() for owned in chosen}
            taken = await self._attempt(points, timeout_s)
            if not taken:
                self._dirty.update(dict.fromkeys(chosen))
            self._on_commit(points, taken)
            return taken

    async def flush(self) -> None:
        """Returns once everything submitted is durable and committed, or another's. Bound it by cancelling it."""
        while True:
            if self._writes:
                await asyncio.wait(self._writes)
            # A commit under way is waited for, too.
            if await self.commit() and not (self._writes or self._dirty):
                return
            await asyncio.sleep(_RETRY_S)

    def reopened(self, owned: OwnedPartition) -> None:
        """A tentative partition is open again: what was done meanwhile is to be committed."""
        self._mark(owned)

    async def abandon(self) -> None:
        """Ends the writes that are left: their prompts come again."""
        for task in self._writes:
            task.cancel()
        await asyncio.gather(*self._writes, return_exceptions=True)

    async def _attempt(self, points: Mapping[TopicPartition, tuple[int, str]], timeout_s: float) -> bool:
        try:
            await asyncio.wait_for(self._offsets.commit(points), timeout_s)
        except (KafkaError, IllegalStateError, TimeoutError) as error:
            _log.info("offsets are not committed yet", error=type(error).__name__)
            return False
        return True

    async def _write(self, completion: Completion) -> None:
        durable = False
        try:
            durable = await self._until_durable(completion)
        finally:
            if durable:
                completion.owned.tracker.complete(completion.offset)
                self._mark(completion.owned)
            completion.settled(durable)

    async def _until_durable(self, completion: Completion) -> bool:
        """Writes until every record is acknowledged; False when the partition was lost first."""
        left, num_durable = completion.records, 0
        pause_s = _RETRY_S
        while await completion.owned.may_write():
            try:
                while left:
                    await (await self._output.send(left[0]))
                    left, num_durable = left[1:], num_durable + 1
            except RequestError as error:
                if left == (smaller := completion.replacement(num_durable)):
                    _log.error("a terminal record cannot be written", code=error.code, offset=completion.offset)
                    await asyncio.sleep(_RETRY_MAX_S)
                left = smaller
            except (KafkaError, OSError) as error:
                _log.info("a terminal record waits for the broker", error=type(error).__name__)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _RETRY_MAX_S)
            else:
                return True
        return False

    def _mark(self, owned: OwnedPartition) -> None:
        self._dirty[owned] = None
        self._wake.set()
