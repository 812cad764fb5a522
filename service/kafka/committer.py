"""Terminal records and offsets: the one place that knows in which order they become durable, which makes this at least once.

Guarantees: an offset is done only after every terminal record of its prompt is acknowledged; `(low, metadata)` is committed every
`interval_s` while there is something new, at once when idle; nothing is written or committed for a partition that is not `open`.
A crash between the acknowledgement and the commit redelivers the prompt: its terminal record may then come twice, with the same
request id. For brokers without transactions; with them: `transactional.py`. Of a `retired` partition results are written alone.
Bounded by the intake: a record's tokens are released only once it is durable.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

import structlog
from aiokafka.errors import IllegalStateError, KafkaError

from service.cancellation import end_tasks
from service.errors import RequestError
from service.kafka.completion import Completion
from service.kafka.output import Output
from service.kafka.ownership import OwnedPartition
from service.kafka.records import TopicPartition

_log = structlog.get_logger(__name__)

_RETRY_S = 0.2
_RETRY_MAX_S = 5.0
COMMIT_TIMEOUT_S = 5.0


class Offsets(Protocol):
    """Where progress is committed."""

    async def commit(self, points: Mapping[TopicPartition, tuple[int, str]]) -> None:
        """Commits (low, metadata) of each partition. Raises `KafkaError` when the group did not take it."""
        ...


class Committer:
    """`Commits` without transactions. `run` is its task; `flush` ends a drain."""

    def __init__(
        self,
        output: Output,
        offsets: Offsets,
        *,
        interval_s: float,
        on_commit: Callable[[tuple[Completion, ...], bool], None] = lambda batch, ok: None,
    ) -> None:
        """`on_commit` hears of each commit, and whether it was taken."""
        self._output = output
        self._offsets = offsets
        self._interval_s = interval_s
        self._on_commit = on_commit
        self._writes: set[asyncio.Task[None]] = set()
        self._dirty: dict[OwnedPartition, list[Completion]] = {}
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

    async def fence(self, partition: TopicPartition) -> None:
        """Nothing is to be fenced: the group's generation is all that tells an old owner's commit from a new one's."""

    async def claim(self, partition: TopicPartition, point: tuple[int, str]) -> None:
        await self._offsets.commit({partition: point})

    def opened(self, owned: OwnedPartition) -> None:
        """What was done while its owner was being decided is to be committed."""
        self._dirty.setdefault(owned, [])
        self._wake.set()

    async def run(self) -> None:
        """Commits until cancelled."""
        pause_s = self._interval_s
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                if await self.commit():
                    pause_s = self._interval_s
                else:
                    pause_s = min(max(pause_s, _RETRY_S) * 2, _RETRY_MAX_S)
                    self._wake.set()
                await asyncio.sleep(pause_s)
        finally:
            await end_tasks(self._writes)

    async def commit(self, timeout_s: float = COMMIT_TIMEOUT_S) -> bool:
        """Commits what is done now; False when the broker did not take it (it stays to be committed)."""
        async with self._commit_lock:
            chosen = {owned: batch for owned, batch in self._dirty.items() if owned.state == "open"}
            # What is lost is its new owner's to commit; what is tentative waits for its state.
            self._dirty = {owned: batch for owned, batch in self._dirty.items() if owned.state in ("opening", "tentative")}
            if not chosen:
                return True
            points = {owned.partition: owned.tracker.commit_point() for owned in chosen}
            taken = await self._attempt(points, timeout_s)
            for owned, batch in chosen.items():
                if taken:
                    owned.tracker.committed()
                else:
                    self._dirty[owned] = batch + self._dirty.get(owned, [])
            self._on_commit(tuple(completion for batch in chosen.values() for completion in batch), taken)
            return taken

    async def flush(self, timeout_s: float) -> bool:
        """True once everything submitted is durable and committed, or another's."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if self._writes:
                        await asyncio.wait(self._writes)
                    # A commit under way is waited for, too.
                    if await self.commit() and not (self._writes or self._dirty):
                        return True
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError:
            return False

    async def _attempt(self, points: Mapping[TopicPartition, tuple[int, str]], timeout_s: float) -> bool:
        try:
            # Not `wait_for`, which before Python 3.12 loses a cancellation that comes together with the answer.
            async with asyncio.timeout(timeout_s):
                await self._offsets.commit(points)
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
                self._dirty.setdefault(completion.owned, []).append(completion)
                self._wake.set()
            completion.settled(durable)

    async def _until_durable(self, completion: Completion) -> bool:
        """Writes until every record is acknowledged; False when the partition was lost first."""
        left = completion.records
        offsets: list[int] = []
        pause_s = _RETRY_S
        while await completion.owned.may_write():
            try:
                while left:
                    offsets.append(await (await self._output.send(left[0])))
                    left = left[1:]
            except RequestError as error:
                if left == (smaller := completion.replacement(len(offsets))):
                    _log.error("a terminal record cannot be written", code=error.code, offset=completion.offset)
                    await asyncio.sleep(_RETRY_MAX_S)
                left = smaller
            except (KafkaError, OSError) as error:
                _log.info("a terminal record waits for the broker", error=type(error).__name__)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _RETRY_MAX_S)
            else:
                completion.written(offsets)
                return True
        return False
