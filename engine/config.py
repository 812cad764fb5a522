"""Every setting of the engine; a field's default stands here and its docstring says why.

Standard library only: the service builds an `EngineConfig` and sends it to the child.
"""

from dataclasses import dataclass
from typing import Literal

from engine.errors import ConfigError

EngineKind = Literal["paged", "stand-in"]
LoadFormat = Literal["auto", "safetensors", "dummy"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
KVCacheDType = Literal["auto", "int8"]
Policy = Literal["fcfs", "priority"]
Overlap = Literal["auto", "on", "off"]
Quantize = Literal["", "int8", "int4"]
CpuIsa = Literal["auto", "torch", "scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How one engine loads, schedules and runs. Raises `ConfigError` that names the field."""

    model_dir: str = ""
    """A Hugging Face directory: config.json, tokenizer.json, *.safetensors."""

    kind: EngineKind = "paged"
    """`stand-in` says a deterministic function of (prompt, seed, position) and loads no model: for fault and throughput tests."""

    load_format: LoadFormat = "auto"
    """`auto` and `safetensors` read *.safetensors; `dummy` makes random weights of the configured shape."""

    dtype: DType = "auto"
    """Of weights and KV cache; `auto` takes the checkpoint's own, float32 where that is float16 on a CPU."""

    kv_cache_dtype: KVCacheDType = "auto"
    """`int8` keeps keys and values as bytes with a scale for each head of each token, for the C++ operators of a CPU: a cache of as many
    bytes holds nearly twice the tokens of bfloat16, and attention reads half as much. Nearly, not quite, the same model."""

    device: str = "auto"
    """`auto`: the first CUDA or ROCm device, else the CPU."""

    quantize: Quantize = ""
    """Weights of a plain checkpoint are stored so when it is loaded: `int8` (a scale an output) or `int4` (a scale for 32 inputs), for
    the C++ operators of a CPU. The embedding stays as it is, and with `int4` so does the head. Faster and smaller, and not quite the
    same model."""

    screen_head: bool = True
    """Keeps a plain head a second time, in 8 bits, for the C++ operators of a CPU: the greedy tokens of a step that wants nothing else are
    found from half the bytes, and are the same tokens. Takes a byte for each of the head's weights (SmolLM2-135M: 28 MB); nothing
    without AVX2, on a GPU, or where `quantize` has the head in 8 bits anyway."""

    cpu_isa: CpuIsa = "auto"
    """What computes on a CPU: `auto` builds the C++ operators once and takes the processor's best instruction set, plain torch where
    there is no compiler; `torch` never builds; an instruction set is taken or refused."""

    attention_backend: str = "auto"
    """`auto`: Triton on CUDA and ROCm, the C++ operators or else plain torch on a CPU; or a name of engine.attention's registry."""

    max_model_len: int = 0
    """Context in tokens; 0 takes the model's own, at most what the block pool can hold."""

    block_size: int = 16
    """Tokens a KV block: small enough to waste little, large enough to copy in lines."""

    num_blocks: int = 0
    """Blocks in the pool; 0 derives them from `kv_cache_bytes`."""

    kv_cache_bytes: int = 0
    """Memory for the KV cache; 0: 1 GiB on a CPU (half of all memory at most), 90 % of what is free after loading on a
    GPU."""

    max_num_seqs: int = 64
    """Sequences that run at once."""

    preferred_num_seqs: int = 0
    """Sequences up to which a newcomer runs at once. With so many running, one more makes the tokens of all of them slower in proportion:
    it waits `max_queue_delay_ms` at most for one of them to end. 0: 16 on a CPU, `max_num_seqs` (nobody waits for that) on a GPU."""

    max_queue_delay_ms: int = 0
    """Most that a newcomer waits so; what has waited longer fills `max_num_seqs`. 0, as for a batch whose end alone counts: nobody does."""

    max_num_waiting: int = 1024
    """Sequences that wait inside the engine; admission keeps this queue short, so reaching it refuses with `overloaded`."""

    max_num_batched_tokens: int = 512
    """Token budget of a step: bounds a step's time, and so the gap that a prefill makes between others' tokens."""

    max_prefill_chunk: int = 0
    """One request's share of a step in prefill tokens; 0: the whole budget."""

    enable_prefix_cache: bool = True
    """Blocks of equal prefixes (and equal salt) are computed once."""

    overlap: Overlap = "auto"
    """Whether the next step is decided and launched before the tokens of this one are known, so that nothing waits for the host: `auto`
    on a GPU, and on a CPU with two threads or more, there for steps of single greedy tokens behind such steps alone, while nobody can
    be let in. A request that arrives meanwhile enters one step later, and does not find blocks that a step under way computes; a
    sequence that ends at a stop token has one step computed for nothing."""

    policy: Policy = "fcfs"
    """Who runs next: `fcfs` by arrival, `priority` by priority, then arrival."""

    watermark: float = 0.01
    """Share of the pool kept back when a waiting sequence is let in, so that running ones can grow before they preempt."""

    num_threads: int = 0
    """Compute threads on a CPU; 0: the cores that the process may use, by affinity and cgroup quota."""

    pin_threads: bool = False
    """Keeps each compute thread of the engine child on a core of its own; OMP_PLACES and OMP_PROC_BIND in the environment win.

    Off: a pinned thread cannot leave a core that something else uses, and then every thread waits for it."""

    nice: int = 5
    """POSIX nice value of the engine child on a CPU, 0 to 19: above 0, what brings it prompts and takes its tokens gets a core sooner.
    It weighs within a cgroup (a container), and with autogroups within a session."""

    stand_in_tokens_per_s: float = 0.0
    """Pace of one sequence of the stand-in engine; 0: as fast as it can."""

    stand_in_step_tokens: int = 1
    """Most tokens that the stand-in engine says of one sequence in a step, as an engine that drafts would."""

    stand_in_max_model_len: int = 8192
    """Context that the stand-in engine claims."""

    def __post_init__(self) -> None:
        positive = (
            "block_size",
            "max_num_seqs",
            "max_num_waiting",
            "max_num_batched_tokens",
            "stand_in_step_tokens",
            "stand_in_max_model_len",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"engine.{name} must be at least 1", field=f"engine.{name}")
        for name in (
            "max_model_len",
            "num_blocks",
            "kv_cache_bytes",
            "max_prefill_chunk",
            "preferred_num_seqs",
            "num_threads",
            "stand_in_tokens_per_s",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"engine.{name} must not be negative (0: chosen for you)", field=f"engine.{name}")
        # Far beyond these the tables of the slots take all memory, and OpenMP ends the process for want of it without a word.
        for name, most in (("max_num_seqs", 65_536), ("num_threads", 1_024)):
            if getattr(self, name) > most:
                raise ConfigError(f"engine.{name} must be at most {most}", field=f"engine.{name}")
        if self.max_queue_delay_ms < 0:
            raise ConfigError("engine.max_queue_delay_ms must not be negative", field="engine.max_queue_delay_ms")
        if not 0 <= self.nice <= 19:
            raise ConfigError("engine.nice must lie in [0, 19]", field="engine.nice")
        if not 0.0 <= self.watermark < 0.5:
            raise ConfigError("engine.watermark must lie in [0, 0.5)", field="engine.watermark")
        if self.kind == "paged" and not self.model_dir:
            raise ConfigError("engine.model_dir is missing: name a model directory", field="model.path")
