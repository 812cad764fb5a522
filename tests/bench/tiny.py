"""A model directory of a tiny Llama without weights, for benchmarks of everything but arithmetic (load_format="dummy")."""

import json
from pathlib import Path

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}


def write_tiny_model(directory: str | Path) -> None:
    """Writes config.json alone."""
    (Path(directory) / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
