"""What the runner remembers of each request slot: its tokens and its block table, in host arrays that steps index in bulk.

Invariant: `tokens[slot, :known[slot]]` are the slot's known tokens; `blocks[slot, :num_blocks[slot]]` its blocks in order;
`starts[slot]` counts the sequences that it held.
"""

import numpy as np
from numpy.typing import NDArray

from engine.scheduling.step import Chunk, SequenceStart

Ints = NDArray[np.int64]


class SlotTable:
    """`num_slots` slots of at most `max_tokens` tokens, and the blocks of `block_size` that hold them."""

    def __init__(self, *, num_slots: int, max_tokens: int, block_size: int) -> None:
        self.tokens = np.zeros((num_slots, max_tokens + 1), np.int64)
        self.blocks = np.zeros((num_slots, -(-max_tokens // block_size) + 1), np.int32)
        self.known = np.zeros(num_slots, np.int64)
        self.num_blocks = np.zeros(num_slots, np.int64)
        self.num_prompt = np.zeros(num_slots, np.int64)
        self.starts = np.zeros(num_slots, np.int64)

    def start(self, start: SequenceStart) -> None:
        """Replaces what the slot held."""
        count = len(start.token_ids)
        self.tokens[start.slot, :count] = start.token_ids
        self.known[start.slot] = count
        self.num_prompt[start.slot] = start.num_prompt_tokens
        self.num_blocks[start.slot] = 0
        self.starts[start.slot] += 1

    def grow(self, chunk: Chunk) -> None:
        """Appends a chunk's new blocks to its slot's table."""
        have = int(self.num_blocks[chunk.slot])
        end = have + len(chunk.new_block_ids)
        self.blocks[chunk.slot, have:end] = chunk.new_block_ids
        self.num_blocks[chunk.slot] = end

    def append(self, slots: Ints, tokens: Ints) -> None:
        """Appends the token that a step gave each of these slots, [n] both; a slot stands there once."""
        known = self.known[slots]
        self.tokens[slots, known] = tokens
        self.known[slots] = known + 1
