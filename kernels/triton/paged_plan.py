"""The work lists of one step's attention: built on the device once, without waiting for it, and shared by all layers.

Owns the step's lists and the scratch for partial results. Knows lengths and tables, never queries or caches. Lists depend
on the window and the group size, which a step's description does not tell: each is built when the first layer asks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.triton.tuning import SPLIT_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkList:
    """Entries of some sequences, one sequence after another.

    starts: [num_seqs + 1] int32, the first entry of each sequence, then their number; owners: [capacity] int32, the
    sequence of each entry, undefined behind the last. `capacity` is a host bound of the number.
    """

    starts: Tensor
    owners: Tensor
    capacity: int


def work_list(counts: Tensor, capacity: int) -> WorkList:
    """The list of counts[i] entries of each sequence i. counts: [num_seqs] int32; capacity: at least their sum. No device sync."""
    starts = torch.zeros(counts.shape[0] + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
    entries = torch.arange(capacity, dtype=torch.int32, device=counts.device)
    owners = torch.searchsorted(starts[1:], entries, right=True, out_int32=True)
    return WorkList(starts=starts, owners=owners, capacity=capacity)


class PagedPlan:
    """One step's chunks as the attention kernels see them: the first `num_decodes` are single tokens, the others prefill.

    seq_lens: [num_seqs] int32; query_start_loc: [num_seqs + 1] int32; block_tables: [num_seqs, max_blocks] int32, padded.
    `num_tokens` and `max_seq_len` (a bound) are host ints. A sequence of length 0 among the decodes is padding: its row of
    the output is left unwritten.
    """

    def __init__(
        self,
        *,
        seq_lens: Tensor,
        query_start_loc: Tensor,
        block_tables: Tensor,
        num_decodes: int,
        num_tokens: int,
        max_seq_len: int,
    ) -> None:
        self.seq_lens = seq_lens
        self.query_start_loc = query_start_loc
        self.block_tables = block_tables
        self.num_decodes = num_decodes
        self.num_prefills = seq_lens.shape[0] - num_decodes
        self.num_prefill_tokens = num_tokens - num_decodes
        self.max_seq_len = max_seq_len
        self._decode: dict[int, WorkList] = {}
        self._prefill: dict[int, WorkList] = {}
        self._scratch: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def max_splits(self, window: int) -> int:
        """The most splits that one decode can have; a host int."""
        whole = -(-self.max_seq_len // SPLIT_TOKENS)
        # A window's ends fall inside splits: it touches one more than it fills.
        return min(whole, -(-window // SPLIT_TOKENS) + 1) if window else whole

    def decode_list(self, window: int) -> WorkList:
        """An entry for each split of each decode, for one sliding window (0: none)."""
        if window not in self._decode:
            lens = self.seq_lens[: self.num_decodes]
            counts = (lens + (SPLIT_TOKENS - 1)) // SPLIT_TOKENS
            if window:
                counts -= (lens - window).clamp_(min=0) // SPLIT_TOKENS
            self._decode[window] = work_list(counts, self.num_decodes * self.max_splits(window))
        return self._decode[window]

    def prefill_list(self, tokens: int) -> WorkList:
        """An entry for each run of at most `tokens` tokens of each prefill chunk."""
        if tokens not in self._prefill:
            lengths = self.query_start_loc[self.num_decodes :].diff()
            capacity = self.num_prefill_tokens // tokens + self.num_prefills
            self._prefill[tokens] = work_list((lengths + (tokens - 1)) // tokens, capacity)
        return self._prefill[tokens]

    def scratch(self, entries: int, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Partial outputs [entries, num_heads, head_dim], maxima and sums [entries, num_heads], float32, not initialised.

        Layers run one after another on one stream, so all of them use the same memory.
        """
        key = (entries, num_heads, head_dim)
        if key not in self._scratch:
            on = self.seq_lens.device
            outputs = torch.empty(key, dtype=torch.float32, device=on)
            maxima, sums = (torch.empty(key[:2], dtype=torch.float32, device=on) for _ in range(2))
            self._scratch[key] = (outputs, maxima, sums)
        return self._scratch[key]
