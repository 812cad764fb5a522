"""Reads config.json and generation_config.json of a Hugging Face directory into a `ModelConfig`.

The files are data, and are read as such: no remote code can run, and transformers, whose import takes seconds, is not needed. The
defaults for absent keys are those of transformers' config classes; tests hold both equal.
"""

import json
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError
from engine.layers.rotary import ROPE_TYPES, RopeConfig, yarn_attention_factor
from engine.models.config import ModelConfig
from engine.models.registry import MODELS
from engine.quantization.registry import METHODS

_MAX_FILE_BYTES = 16 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What weights may be kept in, by its name in config.json and in `EngineConfig.dtype`."""

# What transformers takes for an absent num_key_value_heads; elsewhere it is num_attention_heads.
_KEY_HEADS = {"MistralForCausalLM": 8, "Qwen2ForCausalLM": 32, "Qwen3ForCausalLM": 32}
MAX_SIZES = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 24,
    "sliding_window": 1 << 24,
}
"""Most that a size may be; the least is 1."""


def read_model_config(model_dir: Path) -> ModelConfig:
    """The model that config.json describes. Raises `CheckpointError` that names the file, the key and what is expected."""
    fields = _Fields(model_dir / "config.json")
    architecture = fields.architecture()
    num_heads = fields.size("num_attention_heads")
    hidden_size = fields.size("hidden_size")
    num_kv_heads = fields.size("num_key_value_heads", default=_KEY_HEADS.get(architecture, num_heads))
    if num_heads % num_kv_heads:
        raise fields.error(f"num_attention_heads ({num_heads}) must be a multiple of num_key_value_heads ({num_kv_heads})")
    if fields.values.get("head_dim") is None and hidden_size % num_heads and architecture != "Qwen3ForCausalLM":
        raise fields.error(f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_heads})")
    head_dim = fields.size("head_dim", default=128 if architecture == "Qwen3ForCausalLM" else hidden_size // num_heads)
    if head_dim % 2:
        raise fields.error(f"head_dim ({head_dim}) must be even, since rotary positions turn pairs")
    activation = fields.values.get("hidden_act", "silu")
    if activation != "silu":
        raise fields.error(f"hidden_act {activation!r} is not supported; silu is")
    bias = fields.flag("attention_bias") and architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    max_position = fields.size("max_position_embeddings")
    num_layers = fields.size("num_hidden_layers")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=num_layers,
        num_q_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6, above=0.0, most=1.0),
        rope=_rope(fields, max_position),
        sliding_windows=_sliding_windows(fields, architecture, num_layers),
        tied=fields.flag("tie_word_embeddings"),
        qkv_bias=bias or architecture == "Qwen2ForCausalLM",
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias") and architecture == "LlamaForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        dtype=fields.dtype(),
        quant_method=fields.quant_method(),
    )


def read_eos_token_ids(model_dir: Path, vocab_size: int) -> tuple[int, ...]:
    """Ids that end a text: of generation_config.json, else of config.json, else none. Raises `CheckpointError`."""
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        if name == "generation_config.json" and not path.exists():
            continue
        value = read_json(path).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise CheckpointError(str(path), f"eos_token_id must hold token ids below {vocab_size}, not {value!r}")
        return tuple(dict.fromkeys(ids))
    return ()


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises `CheckpointError` when it is missing, too large, no UTF-8, no JSON, or no object."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise CheckpointError(str(path), f"is larger than {_MAX_FILE_BYTES} bytes: not a file of this kind")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            str(path), "is missing; a model directory holds config.json, tokenizer.json and *.safetensors"
        ) from error
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(str(path), "must hold a JSON object")
    return value


class _Fields:
    """Typed access to config.json; each refusal names file and key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values = read_json(path)

    def error(self, reason: str) -> CheckpointError:
        return CheckpointError(str(self._path), reason)

    def architecture(self) -> str:
        names = self.values.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise self.error("architectures must name the model's class, for example LlamaForCausalLM")
        if names[0] not in MODELS:
            raise self.error(f"architecture {names[0]!r} is not supported; supported are {', '.join(MODELS)}")
        return names[0]

    def size(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        if value is None:
            value = default
        if type(value) is not int or not 1 <= value <= MAX_SIZES[name]:
            raise self.error(f"{name} must be a whole number from 1 to {MAX_SIZES[name]}, not {value!r}")
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if value is not None and type(value) is not bool:
            raise self.error(f"{name} must be true or false, not {value!r}")
        return bool(value)

    def number(
        self, name: str, *, default: float | None, above: float, most: float, within: dict[str, Any] | None = None
    ) -> float:
        value = (self.values if within is None else within).get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= most:
            raise self.error(f"{name} must be a number above {above:g} and at most {most:g}, not {value!r}")
        return float(value)

    def dtype(self) -> torch.dtype | None:
        name = self.values.get("dtype", self.values.get("torch_dtype"))
        if name is None:
            return None
        if not isinstance(name, str) or name not in DTYPES:
            raise self.error(f"dtype {name!r} is not supported; supported are {', '.join(DTYPES)}")
        return DTYPES[name]

    def quant_method(self) -> str:
        found = self.values.get("quantization_config")
        if found is None:
            return ""
        name = found.get("quant_method") if isinstance(found, dict) else None
        if not isinstance(name, str) or name not in METHODS:
            known = ", ".join(sorted(filter(None, METHODS))) or "none yet"
            raise self.error(f"weights are quantised as {name!r}; supported formats: {known}. Use an unquantised release")
        return name


def _sliding_windows(fields: _Fields, architecture: str, num_layers: int) -> tuple[int, ...]:
    values = fields.values
    if architecture == "LlamaForCausalLM":
        return (0,) * num_layers
    window = 0
    if values.get("sliding_window", 4096) is not None:
        window = fields.size("sliding_window", default=4096)
    if architecture == "MistralForCausalLM":
        return (window,) * num_layers
    if not fields.flag("use_sliding_window"):
        return (0,) * num_layers
    first = values.get("max_window_layers", 28)
    kinds = values.get("layer_types")
    if kinds is None:
        if type(first) is not int:
            raise fields.error(f"max_window_layers must be a whole number, not {first!r}")
        return tuple(window if i >= first else 0 for i in range(num_layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in known for kind in kinds):
        raise fields.error(f"layer_types must hold full_attention or sliding_attention for each of {num_layers} layers")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _rope(fields: _Fields, max_position: int) -> RopeConfig:
    """Both forms: transformers 5's `rope_parameters`, and `rope_theta` beside `rope_scaling` before it."""
    values = fields.values
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise fields.error("rope_parameters must be an object")
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise fields.error(f"rope type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    if given.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        raise fields.error("partial_rotary_factor other than 1 is not supported")

    def number(name: str, default: float | None, above: float = 0.0, most: float = 1e9) -> float:
        return fields.number(name, default=default, above=above, most=most, within=given)

    theta = number("rope_theta", fields.number("rope_theta", default=10_000.0, above=1.0, most=1e12), above=1.0, most=1e12)
    if kind == "default":
        return RopeConfig(theta=theta)
    factor = number("factor", None)
    if kind in ("linear", "dynamic"):
        return RopeConfig(rope_type=kind, theta=theta, factor=factor)
    top_level = values.get("original_max_position_embeddings")
    original = int(number("original_max_position_embeddings", top_level or max_position))
    if not original:
        raise fields.error("original_max_position_embeddings must be at least 1")
    if kind == "llama3":
        low, high = number("low_freq_factor", None), number("high_freq_factor", None)
        if low >= high:
            raise fields.error("low_freq_factor must be below high_freq_factor")
        return RopeConfig(
            rope_type=kind,
            theta=theta,
            factor=factor,
            original_max_position=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    mscale, mscale_all_dim = number("mscale", 1.0), number("mscale_all_dim", 1.0)
    both = given.get("mscale") and given.get("mscale_all_dim")
    inferred = yarn_attention_factor(factor, mscale, mscale_all_dim) if both else yarn_attention_factor(factor)
    return RopeConfig(
        rope_type=kind,
        theta=theta,
        factor=factor,
        original_max_position=original,
        beta_fast=number("beta_fast", 32.0, above=1e-9),
        beta_slow=number("beta_slow", 1.0, above=1e-9),
        attention_factor=number("attention_factor", inferred),
        truncate=given.get("truncate", True) is not False,
    )
