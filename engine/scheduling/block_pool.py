"""Who holds which KV block, and which block holds which content.

Invariants: I2 a block's reference count is the number of block tables that hold it, and each block is in exactly one of three
disjoint sets: free (no content worth keeping), evictable (published content, no table), used (at least one table).
I4 only `publish` puts a hash into the index, and the scheduler calls it only once all tokens of the block are computed.
Order is state: free blocks are taken last-in first-out, evictable ones least recently used first; no set decides anything.
Knows no sequences, no tokens and no tensors.
"""

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """A fixed number of blocks, `0 .. num_blocks - 1`. Every operation costs O(blocks named), whatever the pool's size."""

    __slots__ = ("_block_of", "_evictable", "_free", "_hash_of", "_ref_counts", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks without content."""
        return len(self._free)

    @property
    def num_evictable(self) -> int:
        """Blocks with published content that no table holds."""
        return len(self._evictable)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free and evictable."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        """Blocks that at least one table holds."""
        return self.num_blocks - self.num_available

    def ref_count(self, block_id: int) -> int:
        """Tables that hold the block."""
        return self._ref_counts[block_id]

    def hash_of(self, block_id: int) -> bytes | None:
        """The hash under which the block's content can be found, or None."""
        return self._hash_of[block_id]

    def allocate(self, count: int) -> list[int]:
        """Gives `count` blocks to one table: free ones first, then the least recently used content.

        Raises `RuntimeError` when fewer are available: the caller asks `num_available` first.
        """
        if count > self.num_available:
            raise RuntimeError(f"{count} blocks asked for, {self.num_available} available")
        blocks = []
        for _ in range(count):
            block_id = self._free.pop() if self._free else self._evict()
            self._ref_counts[block_id] = 1
            blocks.append(block_id)
        return blocks

    def find(self, hashes: Sequence[bytes], max_blocks: int) -> list[int]:
        """The blocks that hold the longest known prefix of the chain, at most `max_blocks`. Changes nothing."""
        blocks: list[int] = []
        for i in range(min(max_blocks, len(hashes))):
            block_id = self._block_of.get(hashes[i])
            if block_id is None:
                break
            blocks.append(block_id)
        return blocks

    def count_evictable(self, block_ids: Sequence[int]) -> int:
        """How many of the blocks no table holds: sharing them takes that many from `num_available`."""
        counts = self._ref_counts
        return sum(1 for block_id in block_ids if counts[block_id] == 0)

    def share(self, block_ids: Sequence[int]) -> None:
        """One more table holds each of these found blocks."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._evictable[block_id]
            self._ref_counts[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """A table gives its blocks up, last first, so that a sequence's tail is evicted before its head.

        Raises `RuntimeError` for a block that no table holds.
        """
        for block_id in reversed(block_ids):
            count = self._ref_counts[block_id] - 1
            if count < 0:
                raise RuntimeError(f"block {block_id} was released more often than it was taken")
            self._ref_counts[block_id] = count
            if count == 0:
                if self._hash_of[block_id] is None:
                    self._free.append(block_id)
                else:
                    self._evictable[block_id] = None

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """The block's content can be found from now on; the first block with a content keeps the name."""
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash

    def forget(self, block_ids: Sequence[int]) -> None:
        """Nobody finds these blocks' content any more; tables that hold them keep them."""
        for block_id in block_ids:
            block_hash = self._hash_of[block_id]
            if block_hash is not None:
                del self._block_of[block_hash]
                self._hash_of[block_id] = None
                if self._ref_counts[block_id] == 0:
                    del self._evictable[block_id]
                    self._free.append(block_id)

    def forget_all(self) -> None:
        """Nobody finds any content any more; evictable blocks become free."""
        self.forget(list(self._block_of.values()))

    def _evict(self) -> int:
        block_id, _ = self._evictable.popitem(last=False)
        block_hash = self._hash_of[block_id]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block_id] = None
        return block_id
