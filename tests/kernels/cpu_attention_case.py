"""Ragged batches over the C++ cache: shuffled blocks, tables padded with a poisoned block, NaN in every slot that nothing has written."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kernels import reference
from kernels.cpu import attention

Pair = tuple[Tensor, Tensor]


def by_slot(caches: Pair) -> Pair:
    """Copies of C++ caches as `[num_blocks, block_size, Hkv, D]`, numbers in bytes as what they stand for, in float32."""
    k_cache, v_cache = caches
    num_blocks, heads = k_cache.shape[:2]
    keys, scales = _parts(k_cache)
    plain = (
        keys.permute(0, 3, 1, 2, 4).reshape(num_blocks, k_cache.shape[3], heads, -1),
        v_cache.permute(0, 2, 4, 1, 3).reshape(num_blocks, -1, heads, v_cache.shape[3]),
    )
    if scales is None:
        return plain
    k_scales, v_scales = scales.view(torch.bfloat16).float().permute(2, 0, 3, 1, 4).unbind(0)
    return plain[0] * k_scales, plain[1] * v_scales


def fill(caches: Pair, plain: Pair) -> None:
    """Writes `plain`, keys and values [num_blocks, block_size, Hkv, D], into C++ caches; in bytes, rows that `reference.in_bytes` made."""
    k_cache, v_cache = caches
    pair = k_cache.shape[4]
    keys, scales = _parts(k_cache)
    if scales is not None:
        units = [(x.abs().amax(dim=3, keepdim=True) / 127).bfloat16() for x in plain]
        scales.view(torch.bfloat16).copy_(torch.stack(units).permute(1, 3, 0, 2, 4))
        plain = tuple((x / unit.float()).nan_to_num(5.0) for x, unit in zip(plain, units, strict=True))  # type: ignore[assignment]
    keys.copy_(plain[0].unflatten(3, (-1, pair)).permute(0, 2, 3, 1, 4))
    v_cache.copy_(plain[1].unflatten(1, (-1, pair)).permute(0, 3, 1, 4, 2))


def _parts(k_cache: Tensor) -> tuple[Tensor, Tensor | None]:
    # Keys [N, H, D / pair, B, pair]; where they are bytes, scales of keys and values [N, H, 2, B, 2] behind them.
    return (k_cache[:, :, :-2], k_cache[:, :, -2:]) if k_cache.dtype == torch.int8 else (k_cache, None)


@dataclass(slots=True, kw_only=True)
class Case:
    """Arguments of one call; `context`: the caches before it, by slot, in float32 where `cache_dtype` is int8."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos_sin: Tensor
    positions: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    slot_mapping: Tensor
    context: Pair
    cache_dtype: torch.dtype
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
        """chunks: (context with the chunk, chunk length) a sequence; q, k and v are parts of one tensor, as a fused projection gives.

        dtype: of the caches; of q, k and v too, bfloat16 beside int8.
        """
        in_bytes = dtype == torch.int8
        kept, dtype = (torch.float32, torch.bfloat16) if in_bytes else (dtype, dtype)
        generator = torch.Generator().manual_seed(seed)
        num_q_heads, num_kv_heads = heads
        needed = [-(-length // block_size) for length, _ in chunks]
        num_blocks = sum(needed) + 1
        order = torch.Generator().manual_seed(seed)
        free = torch.randperm(num_blocks - 1, generator=order).add(1).tolist()
        tables = torch.zeros((len(chunks), max(needed, default=0) + 2), dtype=torch.int32)
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        context = torch.full(shape, float("nan"), dtype=kept), torch.full(shape, float("nan"), dtype=kept)
        slots, positions = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
        for i, (length, chunk) in enumerate(chunks):
            tables[i, : needed[i]] = torch.tensor([free.pop() for _ in range(needed[i])], dtype=torch.int32)
            places = torch.arange(length)
            mine = tables[i].long()[places // block_size] * block_size + places % block_size
            before = mine[: length - chunk]
            for cache in context:
                written = torch.randn((length - chunk, num_kv_heads, head_dim), generator=generator)
                cache[before // block_size, before % block_size] = reference.in_bytes(written) if in_bytes else written.to(kept)
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
            cache_dtype=torch.int8 if in_bytes else kept,
            scale=head_dim**-0.5,
            window=window,
        )

    def caches(self) -> Pair:
        """New C++ caches with the context in them."""
        num_blocks, block_size, num_heads, head_dim = self.context[0].shape
        caches = attention.new_cache(num_blocks, num_heads, head_dim, block_size, self.cache_dtype)
        fill(caches, self.context)
        return caches

    def plan(self) -> Tensor:
        """The step's work for the present number of threads."""
        return attention.plan(self.query_start_loc, self.seq_lens, self.q.shape[1], self.k.shape[1], self.window)

    def run(self, caches: Pair | None = None, work: Tensor | None = None) -> Tensor:
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
        q = reference.rotary_kv_write(q, k, v, self.cos_sin, self.positions, k_cache, v_cache, self.slot_mapping)
        if self.cache_dtype == torch.int8:
            for cache in (k_cache, v_cache):
                cache.copy_(reference.in_bytes(cache))
        return self.attended(q, k_cache, v_cache), k_cache, v_cache

    def attended(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of rotated queries over keys and values by slot, by kernels/reference.py."""
        places = (self.block_tables, self.seq_lens, self.query_start_loc)
        return reference.paged_attention(q, keys, values, *places, self.scale, self.window)

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
            cache_dtype=self.cache_dtype,
            scale=self.scale,
            window=self.window,
        )
