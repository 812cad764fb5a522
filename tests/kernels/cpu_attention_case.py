"""Ragged batches over the C++ cache: shuffled blocks, tables padded with a poisoned block, NaN in every slot that nothing has written."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kernels import reference
from kernels.cpu import attention


def by_slot(cache: Tensor, *, keys: bool) -> Tensor:
    """A copy of a C++ cache as `[num_blocks, block_size, Hkv, D]`."""
    num_blocks, heads = cache.shape[:2]
    if keys:  # [N, H, D / pair, B, pair]
        return cache.permute(0, 3, 1, 2, 4).reshape(num_blocks, cache.shape[3], heads, -1)
    return cache.permute(0, 2, 4, 1, 3).reshape(num_blocks, -1, heads, cache.shape[3])


def fill(cache: Tensor, plain: Tensor, *, keys: bool) -> None:
    """Writes `plain` [num_blocks, block_size, Hkv, D] into a C++ cache."""
    pair = cache.shape[4]
    if keys:
        cache.copy_(plain.unflatten(3, (-1, pair)).permute(0, 2, 3, 1, 4))
    else:
        cache.copy_(plain.unflatten(1, (-1, pair)).permute(0, 3, 1, 4, 2))


@dataclass(slots=True, kw_only=True)
class Case:
    """Arguments of one call; `context`: the caches before it, by slot."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos_sin: Tensor
    positions: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    slot_mapping: Tensor
    context: tuple[Tensor, Tensor]
    scale: float
    window: int

    @classmethod
    def make(
        cls,
        chunks: list[tuple[int, int]],
        *,
        heads: tuple[int, int] = (6, 2),
        head_dim: int = 64,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        window: int = 0,
        seed: int = 0,
    ) -> Self:
        """chunks: (context with the chunk, chunk length) a sequence; q, k and v are parts of one tensor, as a fused projection gives."""
        generator = torch.Generator().manual_seed(seed)
        num_q_heads, num_kv_heads = heads
        needed = [-(-length // block_size) for length, _ in chunks]
        num_blocks = sum(needed) + 1
        order = torch.Generator().manual_seed(seed)
        free = torch.randperm(num_blocks - 1, generator=order).add(1).tolist()
        tables = torch.zeros((len(chunks), max(needed, default=0) + 2), dtype=torch.int32)
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        context = torch.full(shape, float("nan"), dtype=dtype), torch.full(shape, float("nan"), dtype=dtype)
        slots, positions = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
        for i, (length, chunk) in enumerate(chunks):
            tables[i, : needed[i]] = torch.tensor([free.pop() for _ in range(needed[i])], dtype=torch.int32)
            places = torch.arange(length)
            mine = tables[i].long()[places // block_size] * block_size + places % block_size
            before = mine[: length - chunk]
            for cache in context:
                written = torch.randn((length - chunk, num_kv_heads, head_dim), generator=generator)
                cache[before // block_size, before % block_size] = written.to(dtype)
            slots.append(mine[length - chunk :])
            positions.append(places[length - chunk :])
        num_tokens = sum(chunk for _, chunk in chunks)
        sizes = [num_q_heads, num_kv_heads, num_kv_heads]
        fused = torch.randn((num_tokens, sum(sizes), head_dim), generator=generator).to(dtype)
        q, k, v = fused.split(sizes, dim=1)
        longest = max((length for length, _ in chunks), default=0)
        angles = torch.arange(longest + 1)[:, None] * 100.0 ** -torch.linspace(0, 1, head_dim // 2)
        return cls(
            q=q,
            k=k,
            v=v,
            cos_sin=torch.cat((angles.cos(), angles.sin()), dim=1),
            positions=torch.cat(positions),
            block_tables=tables,
            seq_lens=torch.tensor([length for length, _ in chunks], dtype=torch.int32),
            query_start_loc=torch.tensor([0, *(chunk for _, chunk in chunks)]).cumsum(0).to(torch.int32),
            slot_mapping=torch.cat(slots),
            context=context,
            scale=head_dim**-0.5,
            window=window,
        )

    def caches(self) -> tuple[Tensor, Tensor]:
        """New C++ caches with the context in them."""
        num_blocks, block_size, num_heads, head_dim = self.context[0].shape
        k_cache, v_cache = attention.new_cache(num_blocks, num_heads, head_dim, block_size, self.context[0].dtype)
        fill(k_cache, self.context[0], keys=True)
        fill(v_cache, self.context[1], keys=False)
        return k_cache, v_cache

    def plan(self) -> Tensor:
        """The step's work for the present number of threads."""
        return attention.plan(self.query_start_loc, self.seq_lens, self.q.shape[1], self.k.shape[1], self.window)

    def run(self, caches: tuple[Tensor, Tensor] | None = None, work: Tensor | None = None) -> Tensor:
        """The C++ operator's result; it writes into `caches`, new ones by default. `work`: its own plan by default."""
        k_cache, v_cache = caches if caches is not None else self.caches()
        return attention.attend(
            self.q,
            self.k,
            self.v,
            self.cos_sin,
            self.positions,
            k_cache,
            v_cache,
            self.block_tables,
            self.seq_lens,
            self.query_start_loc,
            self.slot_mapping,
            self.plan() if work is None else work,
            self.scale,
            self.window,
        )

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """What kernels/reference.py computes in `dtype`: result, keys and values by slot."""
        k_cache, v_cache = (cache.to(dtype, copy=True) for cache in self.context)
        q, k, v = (x.to(dtype) for x in (self.q, self.k, self.v))
        found = reference.attend(
            q,
            k,
            v,
            self.cos_sin,
            self.positions,
            k_cache,
            v_cache,
            self.block_tables,
            self.seq_lens,
            self.query_start_loc,
            self.slot_mapping,
            self.scale,
            self.window,
        )
        return found, k_cache, v_cache

    def only(self, i: int, rows: range | None = None) -> "Case":
        """Sequence i alone; with `rows`, only these rows of its chunk, what lies before them being context that is there already."""
        first, last = int(self.query_start_loc[i]), int(self.query_start_loc[i + 1])
        mine = slice(first, last) if rows is None else slice(first + rows.start, first + rows.stop)
        behind = last - mine.stop
        return Case(
            q=self.q[mine],
            k=self.k[mine],
            v=self.v[mine],
            cos_sin=self.cos_sin,
            positions=self.positions[mine],
            block_tables=self.block_tables[i : i + 1],
            seq_lens=self.seq_lens[i : i + 1] - behind,
            query_start_loc=torch.tensor([0, mine.stop - mine.start], dtype=torch.int32),
            slot_mapping=self.slot_mapping[mine],
            context=self.context,
            scale=self.scale,
            window=self.window,
        )
