"""The shape of a model, in one form for all architectures.

`loading/config_file.py` makes a `ModelConfig` of a config.json. Nothing here knows files.
"""

from dataclasses import dataclass

import torch

from engine.layers.rotary import RopeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of a decoder. `sliding_windows`: one a layer, in tokens, 0 = none."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    sliding_windows: tuple[int, ...]
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: torch.dtype | None = None
    """The checkpoint's own; None when config.json does not say."""
    quant_method: str = ""
    """`quantization_config.quant_method`; "" is none."""
    screen_head: bool = False
    """Whether a plain head is kept in 8 bits as well, where the operators gain by it."""
