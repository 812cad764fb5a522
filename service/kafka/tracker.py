"""Which offsets of one owned partition are done: completion out of order, with an offset that is always safe to commit.

Invariants: every offset below `low` is done or was never a record; `low` itself is not done; bits stand only above `low`;
`low <= next_offset`, so that nothing past the log's end is ever committed. What is lost in a crash is redelivered, what is
committed as done is never handed out again.
Pure: knows no Kafka client, no clock. `commit_point` is what goes into the commit, `decode` what comes back from it.
"""

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass

METADATA_LIMIT_BYTES = 4_096
_VERSION = "sluice1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a commit's metadata says: `done` has bit i set when offset low + i is done; `next_offset` is 0 when not known.

    `chunk_low`: every chunk record of an unfinished prompt stands at or above this offset of the chunk topic; -1 when not known.
    `commits` counts this epoch's commits: who lost the answer to one reads here whether it landed. `result_low`: no result whose
    idempotency key is remembered stands below this offset of the results topic; -1 when not known. `topic_id`: of the topic that this
    was committed for, "" when not known: one of the same name may have taken its place.
    """

    epoch: int = 0
    next_offset: int = 0
    done: int = 0
    chunk_low: int = -1
    commits: int = 0
    result_low: int = -1
    topic_id: str = ""


class PartitionTracker:
    """One partition's progress under one owner. `epoch` names that owner; it grows with each one."""

    def __init__(
        self, *, low: int, epoch: int = 0, done: int = 0, window: int = 8_192, chunk_end: int = 0, topic_id: str = ""
    ) -> None:
        """`done` and `topic_id` as in `Progress`. `window`: offsets between `low` and the newest taken, at most what metadata can hold.

        `chunk_end`: an offset of the chunk topic that no record to come is below.
        """
        if low < 0 or done < 0 or window < 1:
            raise ValueError("low, done and window must not be negative, and the window not empty")
        self.epoch = epoch
        self.topic_id = topic_id
        self.window = window
        self.commits = 0
        self.result_low: Callable[[], int] = lambda: -1
        """Where the results of remembered keys begin, asked at each commit."""
        self._chunk_end = chunk_end
        self._chunks: dict[int, int] = {}
        self._low = low
        self._next = low
        self._done = done
        self._running: set[int] = set()
        self._advance()

    @property
    def low(self) -> int:
        """The next offset to commit."""
        return self._low

    @property
    def next_offset(self) -> int:
        """The offset after the newest one seen: where fetching goes on."""
        return max(self._next, self._low)

    @property
    def running(self) -> frozenset[int]:
        """Offsets taken and not done."""
        return frozenset(self._running)

    @property
    def used(self) -> int:
        """Offsets of the window in use."""
        return self.next_offset - self._low

    @property
    def full(self) -> bool:
        """No further offset may be taken until `low` moves."""
        return self.used >= self.window

    def is_done(self, offset: int) -> bool:
        """Whether `offset` was completed, here or by an earlier owner."""
        return offset < self._low or bool(self._done >> (offset - self._low) & 1)

    def fits(self, offset: int) -> bool:
        """Whether `offset` may be taken now. A hole in the log may be wider than the window: an idle partition takes any offset."""
        return offset - self._low < self.window or not self._running

    def take(self, offset: int) -> bool:
        """Hands `offset` out for work, in the log's order; False when it is done or running already.

        Offsets that the log has skipped (transaction markers, compaction) count as done.
        """
        if offset > self._next:
            self._mark(self._next, offset)
        self._next = max(self._next, offset + 1)
        if self.is_done(offset) or offset in self._running:
            self._advance()
            return False
        self._running.add(offset)
        self._chunks.setdefault(offset, self._chunk_end)
        self._advance()
        return True

    def has_chunks(self, offset: int, at: int) -> None:
        """An earlier owner's chunks of an unfinished `offset` begin at `at`: they are kept until it is done."""
        self._chunks[offset] = min(at, self._chunks.get(offset, at))

    def chunks_written(self, end: int) -> None:
        """The chunk topic is known to reach up to `end`."""
        self._chunk_end = max(self._chunk_end, end)

    def skip_to(self, offset: int) -> None:
        """The log has nothing between the newest offset seen and `offset`, which may not be taken yet: the gap counts as done.

        Within the window only. A gap that reaches its end fills it, so that fetching waits for `low` instead of coming back at once.
        """
        end = min(offset, self._low + self.window)
        if end > self._next:
            self._mark(self._next, end)
            self._next = end
            self._advance()

    def complete(self, offset: int) -> bool:
        """Marks `offset` done and moves `low` over all that is; False when it was not running (a late or double call)."""
        if offset not in self._running:
            return False
        self._running.discard(offset)
        self._chunks.pop(offset, None)
        self._done |= 1 << (offset - self._low)
        self._advance()
        return True

    def release(self, offset: int) -> None:
        """Gives a taken offset back undone: nothing is written for it here, and it holds `low` where it is."""
        self._running.discard(offset)

    def commit_point(self, *also: int) -> tuple[int, str]:
        """`low` and the metadata beside it, of at most `METADATA_LIMIT_BYTES`, as they are once the running `also` are done, too.

        Changes nothing: whether a commit landed shows only later. Its number is `commits` + 1.
        """
        done = self._done
        for offset in also:
            done |= 1 << (offset - self._low)
        count = self._num_leading(done)
        low = self._low + count
        ending = frozenset(also)
        marks = (at for offset, at in self._chunks.items() if offset >= low and offset not in ending)
        progress = Progress(
            epoch=self.epoch,
            next_offset=self.next_offset,
            done=done >> count,
            chunk_low=min(marks, default=self._chunk_end),
            commits=self.commits + 1,
            result_low=self.result_low(),
            topic_id=self.topic_id,
        )
        return low, encode(progress)

    def committed(self) -> None:
        """A commit has landed."""
        self.commits += 1

    def _mark(self, start: int, end: int) -> None:
        start = max(start, self._low)
        if end > start:
            self._done |= ((1 << (end - start)) - 1) << (start - self._low)

    def _advance(self) -> None:
        count = self._num_leading(self._done)
        self._done >>= count
        self._low += count

    def _num_leading(self, done: int) -> int:
        """Offsets from `low` on that are all done.

        Bits may be set above `next_offset` (an earlier owner's): `low` moves over those only once the log has shown them.
        """
        return min((~done & (done + 1)).bit_length() - 1, max(self._next - self._low, 0))


def encode(progress: Progress) -> str:
    """The metadata string: ASCII; the bits plain or as run lengths, whichever is shorter."""
    words = [_VERSION, f"e={progress.epoch}", f"n={progress.next_offset}", f"t={progress.commits}"]
    if progress.chunk_low >= 0:
        words.append(f"c={progress.chunk_low}")
    if progress.result_low >= 0:
        words.append(f"k={progress.result_low}")
    if progress.topic_id:
        words.append(f"i={progress.topic_id}")
    if progress.done:
        plain = "b=" + _to_text(progress.done.to_bytes((progress.done.bit_length() + 7) // 8, "little"))
        # Runs cannot win once there are many; not building them keeps a full window cheap.
        runs = _runs(progress.done, limit=len(plain))
        coded = plain if runs is None else "r=" + _to_text(runs)
        words.append(min(plain, coded, key=len))
    return " ".join(words)


def decode(metadata: str | None) -> Progress:
    """What `metadata` says. Anything that this version did not write means "no bits", never an error; unknown words are passed over."""
    words = (metadata or "").split(" ")
    if words[0] != _VERSION or len(metadata or "") > METADATA_LIMIT_BYTES:
        return Progress()
    read = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    try:
        done = 0
        if "b" in read:
            done = int.from_bytes(_from_text(read["b"]), "little")
        elif "r" in read:
            done = _from_runs(_from_text(read["r"]))
        return Progress(
            epoch=_count(read.get("e", "0")),
            next_offset=_count(read.get("n", "0")),
            done=done,
            chunk_low=_count(read["c"]) if "c" in read else -1,
            commits=_count(read.get("t", "0")),
            result_low=_count(read["k"]) if "k" in read else -1,
            topic_id=read.get("i", ""),
        )
    except ValueError:
        return Progress()


def _count(digits: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 19):
        raise ValueError("no count")
    return int(digits)


def _to_text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii").rstrip("=")


def _from_text(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        raise ValueError("no base64") from None


def _runs(bits: int, *, limit: int) -> bytes | None:
    """Lengths of runs of 0, 1, 0, 1 … from bit 0 on, as varints; None once longer than `limit` bytes."""
    coded = bytearray()
    wanted = 0
    while bits:
        inverted = bits if wanted == 0 else ~bits
        length = (inverted & -inverted).bit_length() - 1
        coded += _varint(length)
        if len(coded) > limit:
            return None
        bits >>= length
        wanted ^= 1
    return bytes(coded)


def _from_runs(raw: bytes) -> int:
    bits, position, wanted, shift, length = 0, 0, 0, 0, 0
    for byte in raw:
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte & 0x80:
            continue
        # A length from outside: bounded before anything of that size is made.
        if position + length > METADATA_LIMIT_BYTES * 8:
            raise ValueError("longer than any window")
        if wanted:
            bits |= ((1 << length) - 1) << position
        position, wanted, shift, length = position + length, wanted ^ 1, 0, 0
    if shift:
        raise ValueError("ends inside a number")
    return bits


def _varint(number: int) -> bytes:
    coded = bytearray()
    while number >= 0x80:
        coded.append(number & 0x7F | 0x80)
        number >>= 7
    coded.append(number)
    return bytes(coded)
