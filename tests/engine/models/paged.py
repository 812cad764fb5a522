"""Runs one model over paged caches for the tests: several sequences side by side, in any chunks, without scheduler or runner."""

from pathlib import Path

import torch

from engine.attention.base import AttentionMetadata, KVCacheSpec
from engine.attention.registry import make_backend
from engine.config import EngineConfig
from engine.execution.forward_batch import ForwardBatch
from engine.loading import LoadedModel, load_model, plan_load
from kernels.ops import for_device

CPU = torch.device("cpu")
BLOCK = 4


def load(model_dir: Path, cpu_isa: str = "auto", on: torch.device = CPU, **settings: str | int) -> LoadedModel:
    operators = for_device(on.type, cpu_isa)
    plan = plan_load(EngineConfig(model_dir=str(model_dir), **settings), on, operators)
    return load_model(plan, plan.shape.max_position, on, operators)


class Sequences:
    """`count` sequences, each with its own blocks of one pool; sequence i owns blocks i, count + i, 2 * count + i, …"""

    def __init__(
        self,
        loaded: LoadedModel,
        count: int,
        max_len: int,
        block_size: int = BLOCK,
        on: torch.device = CPU,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        """`cache_dtype`: None for the model's."""
        self.model, shape = loaded.model, loaded.plan.shape
        self.on = on
        self.block_size = block_size
        self.num_blocks = -(-max_len // block_size)
        cache = KVCacheSpec(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            block_size=block_size,
            dtype=cache_dtype or loaded.plan.dtype,
        )
        self.backend = make_backend("auto", on, for_device(on.type), cache)
        self.caches = self.backend.allocate(cache, self.num_blocks * count, on)
        self.tables = torch.arange(self.num_blocks * count, dtype=torch.int32).view(self.num_blocks, count).t().contiguous()
        self.computed = [0] * count

    def step(self, chunks: dict[int, list[int]]) -> torch.Tensor:
        """Computes each sequence's next tokens, chunks of one token first; logits of every token, [num_tokens, V], in that order."""
        order = sorted(chunks, key=lambda i: len(chunks[i]) > 1)
        starts, positions, slots = [0], [], []
        for i in order:
            places = torch.arange(self.computed[i], self.computed[i] + len(chunks[i]))
            positions.append(places)
            slots.append(self.tables[i].long()[places // self.block_size] * self.block_size + places % self.block_size)
            starts.append(starts[-1] + len(chunks[i]))
            self.computed[i] += len(chunks[i])
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor(starts, dtype=torch.int32, device=self.on),
            seq_lens=torch.tensor([self.computed[i] for i in order], dtype=torch.int32, device=self.on),
            block_tables=self.tables[order].to(self.on),
            slot_mapping=torch.cat(slots).to(self.on),
            num_single_token_chunks=sum(len(chunks[i]) == 1 for i in order),
            max_query_len=max(len(chunk) for chunk in chunks.values()),
            max_seq_len=max(self.computed[i] for i in order),
        )
        batch = ForwardBatch(
            attention=self.backend.prepare(metadata), backend=self.backend, caches=self.caches, logits_indices=None
        )
        with torch.inference_mode():
            ids = torch.tensor([token for i in order for token in chunks[i]], device=self.on)
            hidden = self.model.forward(ids, torch.cat(positions).to(self.on), batch)
            return self.model.compute_logits(hidden).cpu()
