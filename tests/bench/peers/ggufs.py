"""Checkpoints as GGUF files for llama.cpp, made from the very values that every other system loads.

Matrices take the file's format, norms and biases stay float32. The vocabulary is left out ("none"): the benchmark speaks token ids.
For llama.cpp's `llama` architecture rows of query and key are permuted to the adjacent-pair order of rotation that it expects; its
`qwen2` rotates halves, as transformers does.
"""

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType, quants
from safetensors import safe_open

from service.config import cache_dir
from tests.bench.peers.build import locked
from tests.bench.peers.models import ensure_model

FORMATS = {
    "BF16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "F16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "Q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}


ARCHITECTURES = {
    "llama": (gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, False),
}
"""By `model_type` of a configuration: llama.cpp's architecture, and whether it rotates adjacent pairs."""


def ensure_gguf(model: str, name: str) -> Path:
    """The file of a model of `models.known_models` in a format of `FORMATS`, written first where it is missing."""
    target = cache_dir() / "peers" / "gguf" / f"{model}.{name}.gguf"
    if not target.is_file():
        checkpoint = ensure_model(model)
        with locked(target.parent):
            if not target.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                scratch = target.with_suffix(".partial")
                write_gguf(checkpoint, scratch, name, title=model)
                os.replace(scratch, target)
    return target


def write_gguf(model_dir: Path, target: Path, name: str, *, title: str) -> None:
    """A checkpoint of one or more *.safetensors files as one GGUF file. Raises ValueError for what these files cannot say."""
    config = json.loads((model_dir / "config.json").read_text("utf-8"))
    kind, file_type = FORMATS[name]
    if config["model_type"] not in ARCHITECTURES:
        raise ValueError(f"{model_dir}: no architecture {config['model_type']}; there is: {', '.join(ARCHITECTURES)}")
    architecture, adjacent = ARCHITECTURES[config["model_type"]]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(title)
    writer.add_file_type(file_type)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    # Qwen2's configuration has no head_dim.
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - it is no mapping
                values = tensors.get_tensor(key).to(torch.float32).numpy()
                if adjacent and (".q_proj." in key or ".k_proj." in key):
                    values = _adjacent_pairs(values, heads if ".q_proj." in key else kv_heads)
                mapped = names.get_name(key, try_suffixes=(".weight", ".bias"))
                if mapped is None:
                    raise ValueError(f"{file}: {key} is no tensor of {config['model_type']}")
                stored = kind if values.ndim > 1 else GGMLQuantizationType.F32
                writer.add_tensor(mapped, quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rope_theta(config: dict[str, Any]) -> float:
    """The base of a plain rotation, as transformers 5 writes it, or as 4 did. Raises ValueError for any other rotation."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (kind := rope.get("rope_type", "default")) != "default":
        raise ValueError(f"a rotation of type {kind} is not written")
    return float(rope.get("rope_theta") or config["rope_theta"])


def _adjacent_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows (or elements of a bias) of each head from (first half, second half) to pairs (i, i + half) side by side."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(values.shape)
