"""Architectures by the name in config.json's `architectures`. A new one is a file and a line here."""

from importlib import import_module
from typing import Protocol

from torch import Tensor, device, dtype

from engine.execution.forward_batch import ForwardBatch
from engine.models.config import ModelConfig
from kernels.ops import Operators

MODELS = {
    "LlamaForCausalLM": "engine.models.llama:Llama",
    "MistralForCausalLM": "engine.models.llama:Llama",
    "Qwen2ForCausalLM": "engine.models.llama:Llama",
    "Qwen3ForCausalLM": "engine.models.llama:Llama",
}


class Model(Protocol):
    """What every architecture offers. Built with uninitialised weights; `targets` says where each tensor of a checkpoint goes."""

    def forward(self, input_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        """input_ids, positions: [T] int64; out: [num_logits, H], the rows of `batch.logits_indices`, before the final norm."""
        ...

    def compute_logits(self, hidden_rows: Tensor) -> Tensor:
        """hidden_rows: [N, H] as `forward` gave them; out: [N, V] float32."""
        ...

    def best_tokens(self, hidden_rows: Tensor) -> Tensor:
        """What `kernels.reference.greedy` says of `compute_logits`. hidden_rows: [N, H]; out: [N] int64."""
        ...

    def targets(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint must hold, by name: the contiguous view that it is copied into."""
        ...

    def finish(self) -> None:
        """Puts the weights into their final layout, once all of them are loaded."""
        ...


def build(config: ModelConfig, ops: Operators, *, dtype: dtype, on: device) -> Model:
    """The model of `config.architecture`, weights uninitialised. Raises `KeyError` for an architecture not in `MODELS`."""
    module, _, class_name = MODELS[config.architecture].partition(":")
    model: Model = getattr(import_module(module), class_name)(config, ops, dtype=dtype, on=on)
    return model
