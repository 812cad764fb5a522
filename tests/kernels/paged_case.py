"""Builds ragged paged batches for attention tests: shuffled blocks, tables padded with a poisoned block, NaN in unused slots."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedCase:
    """Arguments of `paged_attention`, and each sequence's keys and values as they were before paging ([seq_len, Hkv, D])."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    scale: float
    keys: list[Tensor]
    values: list[Tensor]

    def arguments(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Keyword arguments of the operator, tensors of numbers in `dtype` when given."""
        names = ("q", "k_cache", "v_cache", "block_tables", "seq_lens", "query_start_loc", "scale")
        found = {name: getattr(self, name) for name in names}
        if dtype is not None:
            found |= {name: found[name].to(dtype) for name in names[:3]}
        return found

    def only(self, i: int) -> dict[str, Any]:
        """The same arguments for sequence i alone."""
        first, last = self.query_start_loc[i].item(), self.query_start_loc[i + 1].item()
        return self.arguments() | {
            "q": self.q[first:last],
            "block_tables": self.block_tables[i : i + 1],
            "seq_lens": self.seq_lens[i : i + 1],
            "query_start_loc": torch.tensor([0, last - first], dtype=torch.int32),
        }


def paged_case(
    chunks: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    by_head: bool = True,
) -> PagedCase:
    """chunks: (context with the chunk, chunk length) a sequence. `by_head`: the Triton backend's strides, else the plain ones."""
    generator = torch.Generator().manual_seed(seed)
    num_q_heads, num_kv_heads = heads
    needed = [-(-length // block_size) for length, _ in chunks]
    num_blocks = sum(needed) + 1
    both = torch.full((2, num_blocks, block_size, num_kv_heads, head_dim), float("nan"), dtype=dtype)
    if by_head:
        storage = torch.full((num_blocks, num_kv_heads, 2, block_size, head_dim), float("nan"), dtype=dtype)
        both = storage.permute(2, 0, 3, 1, 4)
    free = torch.randperm(num_blocks - 1, generator=generator).add(1).tolist()
    # Block 0 pads the tables and holds NaN: reading it shows.
    tables = torch.zeros((len(chunks), max(needed, default=0) + 2), dtype=torch.int32)
    keys, values = [], []
    for i, (length, _) in enumerate(chunks):
        mine = [free.pop() for _ in range(needed[i])]
        tables[i, : needed[i]] = torch.tensor(mine, dtype=torch.int32)
        positions = torch.arange(length)
        blocks = tables[i].long()[positions // block_size]
        for cache, kept in ((both[0], keys), (both[1], values)):
            written = torch.randn((length, num_kv_heads, head_dim), generator=generator).to(dtype)
            cache[blocks, positions % block_size] = written
            kept.append(written)
    lengths = torch.tensor([0, *(length for _, length in chunks)])
    return PagedCase(
        q=torch.randn((int(lengths.sum()), num_q_heads, head_dim), generator=generator).to(dtype),
        k_cache=both[0],
        v_cache=both[1],
        block_tables=tables,
        seq_lens=torch.tensor([length for length, _ in chunks], dtype=torch.int32),
        query_start_loc=lengths.cumsum(0).to(torch.int32),
        scale=head_dim**-0.5,
        keys=keys,
        values=values,
    )
