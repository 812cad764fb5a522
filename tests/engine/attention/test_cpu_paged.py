"""The C++ backend says what the torch backend says, layer kinds mixed in one step; engines on it repeat themselves bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.attention.base import AttentionMetadata, KVCacheSpec
from engine.attention.cpu_paged import CpuPagedAttention
from engine.attention.torch_paged import TorchPagedAttention
from engine.config import EngineConfig
from engine.engine import Engine
from kernels.ops import for_device
from tests.engine.driving import run
from tests.engine.test_invariance import Tokens, _requests
from tests.engine.tiny_model import write_tiny_model

CPU = torch.device("cpu")
SPEC = KVCacheSpec(num_layers=2, num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.float32)


def test_each_kind_of_layer_gets_its_own_plan():
    """A windowed layer after a plain one, with another number of query heads; a prompt, then its decode."""
    assert for_device("cpu").attends
    torch.manual_seed(3)
    backends = CpuPagedAttention(), TorchPagedAttention()
    caches = [backend.allocate(SPEC, 8, CPU) for backend in backends]
    cos_sin = torch.randn(128, 64)
    for start, length in ((0, 70), (70, 1)):
        positions = torch.arange(start, start + length)
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor([0, length], dtype=torch.int32),
            seq_lens=torch.tensor([start + length], dtype=torch.int32),
            block_tables=torch.tensor([[3, 1, 4, 2, 6]], dtype=torch.int32),
            slot_mapping=torch.tensor([3, 1, 4, 2, 6])[positions // 16] * 16 + positions % 16,
            num_single_token_chunks=int(length == 1),
            max_query_len=length,
            max_seq_len=start + length,
        )
        prepared = [backend.prepare(metadata) for backend in backends]
        for layer, (heads, window) in enumerate(((6, 0), (4, 20))):
            q, k, v = (torch.randn(length, count, 64) for count in (heads, 2, 2))
            ours, theirs = (
                backend.forward(q, k, v, cos_sin, positions, cache[layer], step, 0.125, window)
                for backend, cache, step in zip(backends, caches, prepared, strict=True)
            )
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def _tokens(model_dir: Path, **changes: object) -> Tokens:
    base = EngineConfig(model_dir=str(model_dir), dtype="bfloat16", num_threads=1, num_blocks=512, max_num_seqs=32)
    engine = Engine(replace(base, **changes))  # type: ignore[arg-type]
    assert engine.facts.attention_backend == "cpu_paged"
    try:
        return run(engine, _requests()).tokens()
    finally:
        engine.close()


def test_an_engine_in_bf16_says_the_same_whatever_the_batch_chunks_and_threads(tmp_path: Path) -> None:
    """I8, bitwise: keys and values are rounded to bf16, where one bit elsewhere may fall to the other side and show as another token."""
    model_dir = write_tiny_model(tmp_path / "tiny")
    alone = _tokens(model_dir, max_num_seqs=1, enable_prefix_cache=False, max_num_batched_tokens=512)
    assert _tokens(model_dir, max_num_batched_tokens=64) == alone
    assert _tokens(model_dir, max_num_batched_tokens=37, num_threads=2) == alone
    assert _tokens(model_dir, num_blocks=20, max_num_batched_tokens=64) == alone


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_size": 4}, "; attention in plain torch for blocks of 4 tokens"),
        ({"cpu_isa": "torch"}, "plain torch, as configured"),
    ],
)
def test_an_engine_says_why_it_attends_in_torch(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    model_dir = write_tiny_model(tmp_path / "tiny")
    engine = Engine(replace(EngineConfig(model_dir=str(model_dir), num_threads=1, num_blocks=512), **changes))  # type: ignore[arg-type]
    engine.close()
    assert engine.facts.attention_backend == "torch_paged"
    assert reason in engine.facts.operators_reason
