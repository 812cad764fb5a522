"""From an `EngineConfig` to a model on its device: reads, checks, then allocates, then fills."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError
from engine.loading import checkpoint, dummy
from engine.loading.config_file import DTYPES, read_eos_token_ids, read_model_config
from engine.loading.header import StoredTensor
from engine.models.config import ModelConfig
from engine.models.registry import Model, build
from engine.quantization.registry import methods
from kernels.ops import Operators


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What is to be allocated, in `dtype`, and filled from `stored` (with random weights where that is None)."""

    shape: ModelConfig
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    stored: dict[str, StoredTensor] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that is ready to run, made by `plan`. `weight_bytes`: what its weights take before they are packed."""

    model: Model
    plan: LoadPlan
    num_parameters: int
    weight_bytes: int


def plan_load(config: EngineConfig, device: torch.device, operators: Operators) -> LoadPlan:
    """Reads and checks everything but the weights' own bytes. Raises `CheckpointError` that names file, tensor and reason,
    `ConfigError` where the model cannot be stored as it is asked for."""
    model_dir = Path(config.model_dir)
    if not model_dir.is_dir():
        raise CheckpointError(str(model_dir), "is no directory; name one with config.json, tokenizer.json and *.safetensors")
    shape = replace(read_model_config(model_dir), screen_head=config.screen_head)
    eos_token_ids = read_eos_token_ids(model_dir, shape.vocab_size)
    if config.quantize:
        shape = replace(shape, quant_method=_quantize(config.quantize, shape, operators))
    if config.load_format == "dummy":
        dtype = _dtype(config, shape, torch.bfloat16, device, operators)
        return LoadPlan(shape=shape, eos_token_ids=eos_token_ids, dtype=dtype, stored=None)
    stored = checkpoint.stored_tensors(model_dir)
    embedding = stored.get("model.embed_tokens.weight")
    dtype = _dtype(config, shape, embedding.dtype if embedding else torch.float32, device, operators)
    # Tensors without memory: every name and shape is compared before any is allocated.
    planned = build(replace(shape, max_position=1), operators, dtype=dtype, on=torch.device("meta"))
    checkpoint.check(stored, planned.targets(), model_dir, tied=shape.tied)
    return LoadPlan(shape=shape, eos_token_ids=eos_token_ids, dtype=dtype, stored=stored)


def load_model(
    plan: LoadPlan,
    max_positions: int,
    device: torch.device,
    operators: Operators,
    progress: Callable[[float, str], None] | None = None,
) -> LoadedModel:
    """The model of `plan` on `device`, computed by `operators`, for sequences of at most `max_positions` tokens.

    `progress` gets (share done in [0, 1], what is being done). Raises `CheckpointError` for a file that changes while it is read.
    """
    tell = progress or (lambda share, what: None)
    tell(0.0, "taking memory for the weights")
    # The rotary table of a context that is claimed, and can never be held, may be larger than the model.
    served = replace(plan.shape, max_position=min(plan.shape.max_position, max_positions))
    model = build(served, operators, dtype=plan.dtype, on=device)
    if plan.stored is None:
        dummy.fill(model.targets(), tell)
    else:
        checkpoint.load(plan.stored, model.targets(), tell)
    num_parameters, weight_bytes = _sizes(model)
    model.finish()
    tell(1.0, "loaded")
    return LoadedModel(model=model, plan=plan, num_parameters=num_parameters, weight_bytes=weight_bytes)


def _quantize(wanted: str, shape: ModelConfig, operators: Operators) -> str:
    """The format that a plain checkpoint is stored in. Raises `ConfigError`."""
    if shape.quant_method:
        raise ConfigError(
            f"engine.quantize is {wanted!r}, but the checkpoint is quantised already ({shape.quant_method})",
            field="engine.quantize",
        )
    if wanted not in methods(operators):
        raise ConfigError(
            f"engine.quantize {wanted!r} needs the C++ operators of a CPU; this engine runs {operators.reason}",
            field="engine.quantize",
        )
    return wanted


def _dtype(
    config: EngineConfig, shape: ModelConfig, stored: torch.dtype, device: torch.device, operators: Operators
) -> torch.dtype:
    """What weights and cache are kept in. Raises `ConfigError`."""
    if config.dtype == "float16" and operators.pack_weight is not None:
        raise ConfigError(
            "model.dtype is float16, but the C++ operators of a CPU take float32 and bfloat16: set it to auto (which keeps a float16 "
            "checkpoint in float32), float32 or bfloat16, or set engine.cpu_isa to torch",
            field="model.dtype",
        )
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    own = shape.dtype or (stored if stored in DTYPES.values() else torch.float32)
    # CPUs compute float16 slowly or in float32 anyway, and float32 holds all of its range.
    return torch.float32 if own == torch.float16 and device.type == "cpu" else own


def _sizes(model: Model) -> tuple[int, int]:
    """Numbers and bytes of all weights, as they were read. Keeps no hold of them: each is let go of when it is packed."""
    targets = model.targets().values()
    return sum(target.numel() for target in targets), sum(target.nbytes for target in targets)
