"""Tokens in, tokens out: one model, one scheduler, one runner, stepped by whoever owns the thread.

`step` = schedule, launch, collect, update, and on a GPU the step after is launched in between (`step_loop`, `execution/runner`).
Synchronous: no I/O, no threads of its own, no waiting for a reader (I10). What a caller asks wrongly raises a typed error from `add`;
what goes wrong in a step ends the requests that it concerns and no other. Any other exception from `step` means that the engine cannot
go on. Composition only: what is built of what stands here, and nothing else.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.attention.base import KVCacheSpec
from engine.attention.registry import check_backend, cpu_refusal, make_backend
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.execution.kv_cache import KVCache, pool_size
from engine.execution.memory import memory_errors
from engine.execution.runner import Runner
from engine.execution.threads import set_compute_threads
from engine.limits import check_vocabulary
from engine.loading import LoadPlan, load_model, plan_load
from engine.output import EngineFacts, StepOutput, StepStats
from engine.request import Request
from engine.scheduling.config import SchedulerConfig
from engine.scheduling.scheduler import Scheduler
from engine.step_loop import StepLoop
from kernels.cpu import BuildError
from kernels.ops import Operators, for_device

Progress = Callable[[float, str], None]

PREFERRED_NUM_SEQS_ON_CPU = 16
"""About where a decode's products take as long as reading the weights for them: from there on a step grows with its sequences."""


def resolve_device(name: str) -> torch.device:
    """`auto`: the first GPU, else the CPU. Raises `ConfigError` for a device that is not there."""
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda:0" if has_gpu else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"engine.device {name!r} is no device: use auto, cpu or cuda:N", field="engine.device") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda" or not has_gpu or (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"engine.device {name!r} is not available here: use auto or cpu", field="engine.device")
    return torch.device("cuda", device.index or 0)


def bind_operators(config: EngineConfig, device: torch.device, progress: Progress | None) -> Operators:
    """The operators that compute on `device`. Raises `ConfigError` when the instruction set asked for cannot be had."""
    try:
        return for_device(device.type, config.cpu_isa, lambda what: progress(0.0, what) if progress else None)
    except BuildError as error:
        raise ConfigError(f"engine.cpu_isa: {error}", field="engine.cpu_isa") from error


def check_model(config: EngineConfig, device: torch.device, operators: Operators) -> None:
    """Raises what `Engine` would raise for this model and configuration, from the files' headers alone: no memory is taken."""
    plan = plan_load(config, device, operators)
    spec = _kv_cache_spec(config, plan)
    make_backend(config.attention_backend, device, operators, spec)
    pool_size(config, spec, plan.shape.max_position, device)


def _kv_cache_spec(config: EngineConfig, plan: LoadPlan) -> KVCacheSpec:
    return KVCacheSpec(
        num_layers=plan.shape.num_layers,
        num_kv_heads=plan.shape.num_kv_heads,
        head_dim=plan.shape.head_dim,
        block_size=config.block_size,
        dtype=torch.int8 if config.kv_cache_dtype == "int8" else plan.dtype,
    )


def _reason(operators: Operators, spec: KVCacheSpec) -> str:
    """Why it is these operators, and why attention is not among them where it could be."""
    refusal = cpu_refusal(operators, spec) if operators.attends else ""
    return f"{operators.reason}; attention in plain torch for {refusal}" if refusal else operators.reason


class Engine:
    """A loaded model that continues requests. Owner of the KV tensors, the scheduler and the runner."""

    def __init__(
        self, config: EngineConfig, progress: Progress | None = None, *, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        """Loads the model and takes the pool's memory. `progress`: (share in [0, 1], what is done), may be None.

        Raises `ConfigError` naming the setting, `CheckpointError` naming the file, `OutOfMemoryError` where the weights do not fit, or
        not even a few tokens can be computed.
        """
        began_ns = clock()
        device = resolve_device(config.device)
        if device.type == "cuda":
            # Triton's launches, events and streams go to the current device.
            torch.cuda.set_device(device)
        check_backend(config.attention_backend, device)
        threads = set_compute_threads(config.num_threads)
        operators = bind_operators(config, device, progress)
        if progress:
            progress(0.0, "reading config.json")
        plan = plan_load(config, device, operators)
        kv_spec = _kv_cache_spec(config, plan)
        backend = make_backend(config.attention_backend, device, operators, kv_spec)
        longest = pool_size(config, kv_spec, plan.shape.max_position, device, loaded=False).max_model_len
        with memory_errors(
            f"there is no memory on {device} for the model's weights: end what else uses it, set model.dtype to bfloat16 where it is "
            "float32, or take a smaller model"
        ):
            loaded = load_model(plan, longest, device, operators, progress)
        pool = pool_size(config, kv_spec, plan.shape.max_position, device)
        cache = KVCache(backend, kv_spec, pool, device)
        runner = Runner(
            model=loaded.model,
            backend=backend,
            caches=cache.layers,
            device=device,
            num_slots=config.max_num_seqs,
            max_model_len=pool.max_model_len,
            block_size=config.block_size,
            vocab_size=plan.shape.vocab_size,
            operators=operators,
            overlap=config.overlap == "on" or (config.overlap == "auto" and (device.type == "cuda" or threads > 1)),
        )
        scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=pool.num_blocks,
                block_size=config.block_size,
                max_num_seqs=config.max_num_seqs,
                max_num_waiting=config.max_num_waiting,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=pool.max_model_len,
                max_prefill_chunk=config.max_prefill_chunk,
                preferred_num_seqs=config.preferred_num_seqs or (PREFERRED_NUM_SEQS_ON_CPU if device.type == "cpu" else 0),
                max_queue_delay_ns=config.max_queue_delay_ms * 1_000_000,
                enable_prefix_cache=config.enable_prefix_cache,
                policy=config.policy,
                watermark=config.watermark,
                eos_token_ids=plan.eos_token_ids,
            )
        )
        self._loop = StepLoop(scheduler, runner, clock)
        self._facts = EngineFacts(
            model=Path(config.model_dir).name,
            architecture=plan.shape.architecture,
            dtype=str(plan.dtype).removeprefix("torch."),
            kv_cache_dtype=str(kv_spec.dtype).removeprefix("torch."),
            device=str(device),
            operators=operators.name,
            operators_reason=_reason(operators, kv_spec),
            quantize=config.quantize,
            attention_backend=backend.name,
            max_model_len=pool.max_model_len,
            vocab_size=plan.shape.vocab_size,
            hidden_size=plan.shape.hidden_size,
            num_blocks=pool.num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            eos_token_ids=plan.eos_token_ids,
            num_parameters=loaded.num_parameters,
            weight_bytes=loaded.weight_bytes,
            kv_cache_bytes=cache.num_bytes,
            load_s=(clock() - began_ns) / 1e9,
            num_threads=threads,
            pid=os.getpid(),
        )

    @property
    def facts(self) -> EngineFacts:
        """What this engine is."""
        return self._facts

    @property
    def has_work(self) -> bool:
        """Whether `step` would compute or hand over something."""
        return self._loop.has_work

    def add(self, request: Request) -> None:
        """Accepts a request; it will end in one finish reason a choice.

        Raises, and then keeps nothing: `InvalidFieldError` (token id outside the vocabulary, id already running),
        `PromptTooLongError`, `TooManyTokensError` (can never fit), `EngineFullError`.
        """
        check_vocabulary(request, self._facts.vocab_size)
        self._loop.add(request)

    def abort(self, request_id: str) -> None:
        """Ends a request at the next step boundary with "cancelled"; unknown ids are ignored."""
        self._loop.abort(request_id)

    def step(self) -> StepOutput:
        """Computes one step and says what it gave. Without work: nothing, and no time spent."""
        return self._loop.step()

    def stats(self) -> StepStats:
        """The present state as a step of no tokens."""
        return self._loop.stats()

    def close(self) -> None:
        """Drops model, pool and everything under way; the engine is not usable afterwards. Idempotent."""
        self.__dict__.pop("_loop", None)
