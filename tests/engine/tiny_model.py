"""A tiny random Llama on disk, with weights large enough that its best tokens stand well apart."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCAB, HIDDEN, WIDE, LAYERS, HEADS, KV_HEADS, HEAD_DIM, CONTEXT, EOS = 320, 64, 96, 2, 4, 2, 16, 512, 2


def write_tiny_model(directory: Path) -> Path:
    """config.json and model.safetensors in float32; the same weights each time."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": EOS,
        "bos_token_id": 1,
        "dtype": "float32",
        "hidden_act": "silu",
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(1234)

    def random(rows: int, columns: int, gain: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * gain / columns**0.5

    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": random(VOCAB, HIDDEN, 4.0),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}.self_attn.q_proj.weight": random(HEADS * HEAD_DIM, HIDDEN, 1.5),
            f"{prefix}.self_attn.k_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN, 1.5),
            f"{prefix}.self_attn.v_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN, 1.5),
            f"{prefix}.self_attn.o_proj.weight": random(HIDDEN, HEADS * HEAD_DIM, 1.5),
            f"{prefix}.mlp.gate_proj.weight": random(WIDE, HIDDEN, 1.5),
            f"{prefix}.mlp.up_proj.weight": random(WIDE, HIDDEN, 1.5),
            f"{prefix}.mlp.down_proj.weight": random(HIDDEN, WIDE, 1.5),
        }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
