"""The rotary table of a model: cosines and sines of every position, for each way of scaling that the Llama family uses.

Formulas as in transformers' modeling_rope_utils, computed in float32 as there, so that logits agree.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """How positions become angles. Which fields count depends on `rope_type`."""

    rope_type: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


def cos_sin_table(config: RopeConfig, head_dim: int, max_position: int) -> Tensor:
    """[max_position, D] float32: the cosines of the D/2 frequencies, then their sines.

    Made on the CPU, so that every device turns by the same angles. `dynamic` equals `default` as long as no sequence passes the
    model's max_position_embeddings; the caller holds to that.
    """
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), inverse_frequencies(config, head_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * config.attention_factor


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """[D/2] float32, radians a position. Raises `ValueError` for a type that is not in `ROPE_TYPES`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (config.theta**exponents)
    if config.rope_type in ("default", "dynamic"):
        return plain
    if config.rope_type == "linear":
        return plain / config.factor
    if config.rope_type == "llama3":
        return _llama3(config, plain)
    if config.rope_type == "yarn":
        return _yarn(config, plain, head_dim)
    raise ValueError(f"rope type {config.rope_type!r} is not one of {ROPE_TYPES}")


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """What cosines and sines are multiplied by when a checkpoint does not say (Peng et al. 2023, section 3.4)."""

    def grown(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return grown(mscale) / grown(mscale_all_dim) if mscale and mscale_all_dim else grown(1.0)


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Llama 3.1: long waves are stretched by `factor`, short ones stay, those between are blended."""
    original, low, high = config.original_max_position, config.low_freq_factor, config.high_freq_factor
    wavelength = 2 * math.pi / plain
    long, short = wavelength > original / low, wavelength < original / high
    blend = (original / wavelength - low) / (high - low)
    between = (1 - blend) * plain / config.factor + blend * plain
    return torch.where(long, plain / config.factor, torch.where(short, plain, between))


def _yarn(config: RopeConfig, plain: Tensor, head_dim: int) -> Tensor:
    """YaRN: a linear ramp over the dimensions between stretched and plain frequencies (Peng et al. 2023, section 3.2)."""

    def dimension(rotations: float) -> float:
        return head_dim * math.log(config.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / config.factor * ramp + plain * (1 - ramp)
