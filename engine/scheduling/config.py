"""What a scheduler is built with, and the numbers that it reports. Standard library only."""

from dataclasses import dataclass

from engine.config import Policy
from engine.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Sizes and rules of one scheduler, resolved from `EngineConfig` and the model. Raises `ConfigError` naming the field.

    `max_prefill_chunk` 0 means the whole token budget. `max_num_waiting` bounds sequences, not requests. With `preferred_num_seqs`
    running (0: `max_num_seqs`), one that came less than `max_queue_delay_ns` ago is not let in yet.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_waiting: int
    max_num_batched_tokens: int
    max_model_len: int
    max_prefill_chunk: int = 0
    preferred_num_seqs: int = 0
    max_queue_delay_ns: int = 0
    enable_prefix_cache: bool = True
    policy: Policy = "fcfs"
    watermark: float = 0.01
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = ("num_blocks", "block_size", "max_num_seqs", "max_num_waiting", "max_num_batched_tokens", "max_model_len")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(f"engine.{name} must be at least 1", field=f"engine.{name}")
        for name in ("max_prefill_chunk", "preferred_num_seqs", "max_queue_delay_ns"):
            if getattr(self, name) < 0:
                raise ConfigError(f"engine.{name} must not be negative", field=f"engine.{name}")
        if not 0.0 <= self.watermark < 0.5:
            raise ConfigError("engine.watermark must lie in [0, 0.5)", field="engine.watermark")
        if self.policy not in ("fcfs", "priority"):
            raise ConfigError(f"engine.policy {self.policy!r} is not known: fcfs or priority", field="engine.policy")

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """The scheduler in numbers, as it stands. free + evictable + used = the pool.

    `num_wasted_slots`: slots of used blocks that hold no computed token. `num_waiting` counts siblings that wait for a shared
    prefill too. Preemptions and prefix tokens are totals since the start; a prefix query is counted once a sequence.
    """

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_evictable_blocks: int
    num_used_blocks: int
    num_wasted_slots: int
    num_preemptions: int
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int
