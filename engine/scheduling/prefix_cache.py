"""What names a block's content: a chained 256-bit hash over the exact tokens up to its end.

Guarantees: two blocks have one name only if salt, block boundaries and every token from the sequence's start are equal (up to
a SHA-256 collision). I4: at most `max_cached_blocks` blocks of a sequence come from the cache, so its last token is always
computed. The index from name to block is the `BlockPool`'s. Knows no requests.
"""

from array import array
from collections.abc import Sequence
from hashlib import sha256

_DOMAIN = b"sluice/prefix-cache/v1\0"
_TOKEN_TYPE = "i"
_TOKEN_BYTES = array(_TOKEN_TYPE).itemsize


def root_hash(salt: str) -> bytes:
    """The 32 bytes that a chain starts from; domain-tagged, so no salt can imitate a block's input."""
    return sha256(_DOMAIN + salt.encode("utf-8", "surrogatepass")).digest()


def extend_hashes(hashes: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int) -> None:
    """Appends the names of the full blocks of `token_ids` that `hashes` does not cover yet.

    A name is sha256(parent's 32 bytes + the block's tokens as raw int32). Token ids must fit in 31 bits.
    """
    first, last = len(hashes), len(token_ids) // block_size
    if first >= last:
        return
    raw = array(_TOKEN_TYPE, token_ids[first * block_size : last * block_size]).tobytes()
    parent = hashes[-1] if hashes else root
    width = _TOKEN_BYTES * block_size
    for offset in range(0, len(raw), width):
        parent = sha256(parent + raw[offset : offset + width]).digest()
        hashes.append(parent)


def max_cached_blocks(num_tokens: int, block_size: int) -> int:
    """Full blocks that leave at least one token to compute: its logits give the next one."""
    return (num_tokens - 1) // block_size
