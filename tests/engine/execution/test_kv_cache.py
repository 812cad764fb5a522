"""How large the pool becomes."""

from dataclasses import replace

import pytest
import torch

from engine.attention.base import KVCacheSpec
from engine.attention.cpu_paged import CpuPagedAttention
from engine.attention.torch_paged import TorchPagedAttention
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.execution import kv_cache
from engine.execution.kv_cache import KVCache, PoolSize, pool_size
from kernels.ops import for_device

CPU = torch.device("cpu")
CONFIG = EngineConfig(kind="stand-in", max_num_seqs=4)
SPEC = KVCacheSpec(num_layers=2, num_kv_heads=3, head_dim=8, block_size=16, dtype=torch.bfloat16)
BLOCK_BYTES = 2 * 2 * 16 * 3 * 8 * 2


def test_a_block_holds_keys_and_values_of_all_layers() -> None:
    """The unit of every size here."""
    assert SPEC.block_bytes == BLOCK_BYTES
    assert replace(SPEC, dtype=torch.int8).block_bytes == 2 * 2 * 16 * 3 * (8 + 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_block_of_the_cpp_backend_takes_what_is_promised(dtype: torch.dtype) -> None:
    """Two layers' keys and values, one stretch of memory a block."""
    spec = replace(SPEC, head_dim=64, dtype=dtype)
    assert for_device("cpu").attends
    caches = CpuPagedAttention().allocate(spec, 5, CPU)
    assert sum(cache.k.stride(0) * cache.k.itemsize for cache in caches) == spec.block_bytes


def test_num_blocks_is_taken_as_it_is() -> None:
    """And the promised context is what they can hold."""
    size = pool_size(replace(CONFIG, num_blocks=10), SPEC, 2048, CPU)
    assert (size.num_blocks, size.max_model_len) == (10, 160)


def test_bytes_give_whole_blocks() -> None:
    """Rounded down."""
    size = pool_size(replace(CONFIG, kv_cache_bytes=50 * BLOCK_BYTES + 1), SPEC, 2048, CPU)
    assert (size.num_blocks, size.max_model_len) == (50, 800)


def test_the_default_pool_is_no_larger_than_all_slots_can_use() -> None:
    """4 sequences of 2,048 tokens."""
    size = pool_size(CONFIG, SPEC, 2048, CPU)
    assert (size.num_blocks, size.max_model_len) == (4 * 128, 2048)


def test_the_default_pool_of_a_cpu_takes_a_gibibyte() -> None:
    """When the slots could use more."""
    size = pool_size(replace(CONFIG, max_num_seqs=10_000), SPEC, 8192, CPU)
    assert size.num_blocks == (1 << 30) // BLOCK_BYTES


def test_the_default_pool_of_a_small_machine_takes_half_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody asked for is not refused."""
    monkeypatch.setattr(kv_cache, "usable_bytes", lambda: 700 * BLOCK_BYTES)
    assert pool_size(CONFIG, SPEC, 8192, CPU).num_blocks == 350


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"max_model_len": 4096}, "engine.max_model_len"),
        ({"num_blocks": 1}, "engine.num_blocks"),
        ({"num_blocks": 63, "max_model_len": 1024}, "engine.num_blocks"),
        ({"kv_cache_bytes": BLOCK_BYTES}, "engine.kv_cache_bytes"),
    ],
)
def test_a_pool_that_cannot_serve_is_refused_by_name(changes: dict[str, int], field: str) -> None:
    """`ConfigError` with the setting in `field`."""
    with pytest.raises(ConfigError) as caught:
        pool_size(replace(CONFIG, **changes), SPEC, 2048, CPU)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_the_caches_have_the_pinned_shape() -> None:
    """One a layer: [num_blocks, block_size, num_kv_heads, head_dim], and the bytes that the facts report."""
    cache = KVCache(TorchPagedAttention(), SPEC, pool_size(replace(CONFIG, num_blocks=5), SPEC, 2048, CPU), CPU)
    assert [tuple(layer.k.shape) for layer in cache.layers] == [(5, 16, 3, 8)] * 2
    assert [tuple(layer.v.shape) for layer in cache.layers] == [(5, 16, 3, 8)] * 2
    assert cache.num_bytes == 5 * BLOCK_BYTES


def test_before_weights_are_loaded_a_gpus_pool_is_bounded_by_all_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing that is freed meanwhile makes it larger; afterwards by what is free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * BLOCK_BYTES, 100 * BLOCK_BYTES))
    gpu = torch.device("cuda", 0)
    sizes = [pool_size(CONFIG, SPEC, 10_000_000, gpu, loaded=loaded) for loaded in (False, True)]
    assert [(size.num_blocks, size.max_model_len) for size in sizes] == [(90, 1440), (18, 288)]


@pytest.mark.parametrize("setting", ["num_blocks", "kv_cache_bytes"])
def test_a_pool_larger_than_all_memory_of_a_cpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    """One that is as large is not; a GPU's pool is not held against the host's memory."""
    monkeypatch.setattr(kv_cache, "usable_bytes", lambda: 50 * BLOCK_BYTES)
    unit = 1 if setting == "num_blocks" else BLOCK_BYTES
    fits, too_large = (replace(CONFIG, **{setting: count * unit}) for count in (50, 51))  # type: ignore[arg-type]
    assert pool_size(fits, SPEC, 2048, CPU).num_blocks == 50
    assert pool_size(too_large, SPEC, 2048, torch.device("cuda", 0)).num_blocks == 51
    with pytest.raises(ConfigError, match=f"{51 * BLOCK_BYTES} bytes .* larger than all memory .*{50 * BLOCK_BYTES}") as caught:
        pool_size(too_large, SPEC, 2048, CPU)
    assert caught.value.field == f"engine.{setting}"


def test_a_cache_that_cannot_be_allocated_is_a_configuration_error() -> None:
    """Names the setting that gave the size."""
    pool = PoolSize(num_blocks=1 << 50, setting="engine.num_blocks", max_model_len=2048)
    with pytest.raises(ConfigError, match=r"cannot be allocated on cpu: lower engine\.num_blocks") as caught:
        KVCache(TorchPagedAttention(), SPEC, pool, CPU)
    assert caught.value.field == "engine.num_blocks"
