"""The demo's model as GGUF files for llama.cpp, made from the imported weights: the very values that every other system loads.

Matrices take the file's format, norms stay float32. The vocabulary is left out ("none"): the benchmark speaks token ids. Query and
key rows are permuted to the adjacent-pair order of rotation that llama.cpp's `llama` architecture expects.
"""

import json
import os
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType, quants
from safetensors import safe_open

from service.cli.demo_model import NAME, ensure_demo_model
from service.config import cache_dir
from tests.bench.peers.build import locked

FORMATS = {
    "BF16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "F16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "Q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}


def ensure_gguf(name: str) -> Path:
    """The file of a format in `FORMATS`, written first where it is missing."""
    target = cache_dir() / "peers" / "gguf" / f"{NAME}.{name}.gguf"
    if not target.is_file():
        with locked(target.parent):
            if not target.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                scratch = target.with_suffix(".partial")
                write_gguf(ensure_demo_model(), scratch, name)
                os.replace(scratch, target)
    return target


def write_gguf(model_dir: Path, target: Path, name: str) -> None:
    """A LLaMA checkpoint of one or more *.safetensors files as one GGUF file."""
    config = json.loads((model_dir / "config.json").read_text("utf-8"))
    kind, file_type = FORMATS[name]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_name(NAME)
    writer.add_file_type(file_type)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - it is no mapping
                values = tensors.get_tensor(key).to(torch.float32).numpy()
                if key.endswith(("q_proj.weight", "k_proj.weight")):
                    values = _adjacent_pairs(values, heads if "q_proj" in key else kv_heads)
                mapped = names.get_name(key, try_suffixes=(".weight", ".bias"))
                if mapped is None:
                    raise ValueError(f"{file}: {key} is no tensor of a LLaMA model")
                stored = kind if values.ndim > 1 else GGMLQuantizationType.F32
                writer.add_tensor(mapped, quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _adjacent_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (first half, second half) to pairs (i, i + half) side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
