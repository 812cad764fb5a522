"""The models that systems are compared on: the demo's, trained, and others of well-known shapes with random weights.

Speed does not depend on what weights say, and none but the demo's can be had everywhere. A made model is written once, in bfloat16,
under `${SLUICE_CACHE:-~/.cache/sluice}/models/made/NAME`: whole or not at all, by one process at a time. Its tokenizer is the demo's,
which nobody uses: systems are given token ids alone.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.cli.demo_model import NAME as DEMO
from service.cli.demo_model import ensure_demo_model
from service.config import cache_dir
from tests.bench.peers.build import locked

SEED = 0
TRAINED, RANDOM = "trained", "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A model to be made: transformers' name of its architecture, and the fields of its configuration."""

    model_type: str
    shape: Mapping[str, Any]


MADE: dict[str, Made] = {
    "qwen2.5-0.5b": Made(
        model_type="qwen2",
        shape={
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "intermediate_size": 4864,
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 8192,
        },
    ),
    "llama-3.2-1b": Made(
        model_type="llama",
        shape={
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 8192,
            "vocab_size": 128_256,
            "tie_word_embeddings": True,
            # The published model stretches its rotation beyond 8192 positions, which are never reached here.
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
        },
    ),
}


def known_models() -> tuple[str, ...]:
    """Every name that `ensure_model` takes, the default first."""
    return (DEMO, *MADE)


def weights_of(name: str) -> str:
    """ "trained" or "random"."""
    return RANDOM if name in MADE else TRAINED


def ensure_model(name: str) -> Path:
    """The directory of a model, fetched or made first where it is missing. Raises `SetupError` when the demo's cannot be had."""
    if name not in MADE:
        return ensure_demo_model()
    target = cache_dir() / "models" / "made" / name
    if not target.is_dir():
        tokenizer = ensure_demo_model()
        with locked(target):
            if not target.is_dir():
                print(f"making {name} with random weights …", file=sys.stderr, flush=True)
                with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as scratch:
                    made = Path(scratch) / name
                    _write(MADE[name], tokenizer, made)
                    os.replace(made, target)
    return target


def _write(model: Made, tokenizer: Path, target: Path) -> None:
    # Late: a reader of names needs no transformers.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model.model_type, **model.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            for name, values in made.named_parameters():
                # transformers begins biases at zero: a system that left them out would go unnoticed.
                if name.endswith(".bias"):
                    values.normal_(std=config.initializer_range)
    made.save_pretrained(target)
    for file in tokenizer.glob("tokenizer*.json"):
        shutil.copy(file, target)
