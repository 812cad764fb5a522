"""How large the block pool is, and the tensors behind it. Owner of the KV tensors; blocks are the scheduler's to give."""

from dataclasses import dataclass

import torch

from engine.attention.base import AttentionBackend, KVCacheSpec, LayerCache
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.host_memory import usable_bytes

DEFAULT_CPU_BYTES = 1 << 30
GPU_SHARE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSize:
    """Blocks of the pool, the setting that gave their number, and the context in tokens that the engine can promise with them."""

    num_blocks: int
    setting: str
    max_model_len: int


def free_device_bytes(device: torch.device, *, loaded: bool) -> int:
    """Memory that the pool may take by default: 1 GiB on a CPU, half of all memory at most; 90 % of what is free now on a GPU, of all it
    has before weights are `loaded`."""
    if device.type == "cpu":
        return min(DEFAULT_CPU_BYTES, usable_bytes() // 2)
    free, total = torch.cuda.mem_get_info(device)
    return int((free if loaded else total) * GPU_SHARE)


def pool_size(
    config: EngineConfig, spec: KVCacheSpec, max_position: int, device: torch.device, *, loaded: bool = True
) -> PoolSize:
    """Sizes the pool from `num_blocks`, else `kv_cache_bytes`, else the device; never more than every slot's whole context.

    Before the weights are `loaded` it says the most that the pool can become, and refuses what no memory left over would help.
    Raises `ConfigError` naming the setting when the model's context is shorter than the one asked for, when the pool
    cannot hold one sequence of the context asked for (for a context of 0, of two blocks), or, on a CPU, when it is larger than all
    memory that this process may use.
    """
    if config.max_model_len > max_position:
        raise ConfigError(
            f"engine.max_model_len is {config.max_model_len}, but the model was made for {max_position} tokens",
            field="engine.max_model_len",
        )
    context = config.max_model_len or max_position
    block_size = spec.block_size
    most = config.max_num_seqs * -(-context // block_size)
    if config.num_blocks:
        num_blocks, setting = config.num_blocks, "engine.num_blocks"
    else:
        budget = config.kv_cache_bytes or free_device_bytes(device, loaded=loaded)
        num_blocks, setting = min(budget // spec.block_bytes, most), "engine.kv_cache_bytes"
    wanted = -(-context // block_size) if config.max_model_len else 2
    if num_blocks < wanted:
        raise ConfigError(
            f"{setting} gives {num_blocks} KV blocks of {spec.block_bytes} bytes; "
            f"at least {wanted} are needed ({wanted * spec.block_bytes} bytes)",
            field=setting,
        )
    num_bytes = num_blocks * spec.block_bytes
    # Pages are taken when they are first written: what is larger would be promised now and end the process in the midst of a stream.
    if device.type == "cpu" and num_bytes > (most_bytes := usable_bytes()):
        raise ConfigError(
            f"the KV cache of {num_bytes} bytes that {setting} gives is larger than all memory that this process may use "
            f"({most_bytes} bytes, by the machine and its cgroup): make it smaller with {setting}",
            field=setting,
        )
    return PoolSize(num_blocks=num_blocks, setting=setting, max_model_len=min(context, num_blocks * block_size))


class KVCache:
    """The keys and values of all layers in the layout that the backend likes. Raises `ConfigError` when they do not fit."""

    def __init__(self, backend: AttentionBackend, spec: KVCacheSpec, pool: PoolSize, device: torch.device) -> None:
        self.num_blocks = pool.num_blocks
        self.num_bytes = pool.num_blocks * spec.block_bytes
        try:
            self.layers: tuple[LayerCache, ...] = backend.allocate(spec, pool.num_blocks, device)
        except (MemoryError, RuntimeError) as error:
            raise ConfigError(
                f"the KV cache of {self.num_bytes} bytes cannot be allocated on {device}: lower {pool.setting}",
                field=pool.setting,
            ) from error
