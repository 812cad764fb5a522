"""Attention of one layer on this CPU, C++ against plain torch: `python -m tests.bench.cpu_attention`. SmolLM2's shape in bf16.

Each backend walks the caches of 30 layers in turn, so that keys and values come from memory as they do in a step. Printed beside the
times: bytes of the context read a second, and the arithmetic of the visible positions; medians, backends interleaved.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from engine.attention.base import AttentionBackend, AttentionMetadata, KVCacheSpec
from engine.attention.cpu_paged import CpuPagedAttention
from engine.attention.torch_paged import TorchPagedAttention
from kernels.cpu import choose

CPU = torch.device("cpu")
LAYERS, Q_HEADS, KV_HEADS, DIM, BLOCK = 30, 9, 3, 64, 16
SHAPES = [
    (1, 32, 1),
    (8, 32, 1),
    (32, 32, 1),
    (1, 512, 1),
    (8, 512, 1),
    (32, 512, 1),
    (1, 2048, 1),
    (8, 2048, 1),
    (1, 512, 512),
]
"""(sequences, context with the chunk, chunk)."""
ROUNDS = 9


class Case:
    """One backend's caches and one step over them."""

    def __init__(
        self,
        backend: AttentionBackend,
        batch: int,
        context: int,
        chunk: int,
        num_layers: int = LAYERS,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.backend = backend
        spec = KVCacheSpec(num_layers=num_layers, num_kv_heads=KV_HEADS, head_dim=DIM, block_size=BLOCK, dtype=dtype)
        width = -(-context // BLOCK)
        self.caches = backend.allocate(spec, batch * width, CPU)
        for cache in self.caches:
            cache.k.normal_()
            cache.v.normal_()
        torch.manual_seed(0)
        tables = torch.randperm(batch * width, dtype=torch.int32).view(batch, width)
        places = torch.arange(context - chunk, context)
        self.positions = places.repeat(batch)
        self.metadata = AttentionMetadata(
            query_start_loc=torch.arange(0, batch * chunk + 1, chunk, dtype=torch.int32),
            seq_lens=torch.full((batch,), context, dtype=torch.int32),
            block_tables=tables,
            slot_mapping=(tables.long()[:, places // BLOCK] * BLOCK + places % BLOCK).flatten(),
            num_single_token_chunks=batch if chunk == 1 else 0,
            max_query_len=chunk,
            max_seq_len=context,
        )
        heads = [Q_HEADS, KV_HEADS, KV_HEADS]
        self.qkv = torch.randn(batch * chunk, sum(heads), DIM).split(heads, dim=1)
        self.cos_sin = torch.randn(context, DIM)

    @torch.inference_mode()
    def layer_s(self) -> float:
        """Seconds a layer of one step, what is prepared once a step included."""
        began = time.perf_counter()
        for layer in self.layers():
            layer()
        return (time.perf_counter() - began) / len(self.caches)

    def layers(self) -> list[Callable[[], Tensor]]:
        """A call a layer; they share what is prepared once a step."""
        step = self.backend.prepare(self.metadata)
        return [
            partial(self.backend.forward, *self.qkv, self.cos_sin, self.positions, cache, step, DIM**-0.5, 0)
            for cache in self.caches
        ]


def read_bytes_s() -> float:
    """The best of five sums over 256 MiB."""
    memory = torch.ones(1 << 26)
    stamps = [time.perf_counter()]
    for _ in range(5):
        memory.sum()
        stamps.append(time.perf_counter())
    return memory.nbytes / min(after - before for before, after in pairwise(stamps))


def main() -> None:
    """Prints one line a shape."""
    print(f"{choose('auto').reason}; {torch.get_num_threads()} threads; {read_bytes_s() / 1e9:.1f} GB/s read by a sum")
    for batch, context, chunk in SHAPES:
        cases = [Case(backend, batch, context, chunk) for backend in (CpuPagedAttention(), TorchPagedAttention())]
        times = [[case.layer_s() for case in cases] for _ in range(ROUNDS)]
        ours, torchs = (statistics.median(column) for column in zip(*times, strict=True))
        read = batch * context * 2 * KV_HEADS * DIM * 2
        flops = 4 * Q_HEADS * DIM * batch * sum(range(context - chunk + 1, context + 1))
        print(
            f"{batch} x {context}, chunk {chunk}: {ours * 1e6:.0f} us ({read / ours / 1e9:.1f} GB/s, {flops / ours / 1e9:.1f} GFLOP/s); "
            f"torch {torchs * 1e6:.0f} us, {torchs / ours:.1f} x"
        )


if __name__ == "__main__":
    main()
