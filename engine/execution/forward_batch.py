"""What a model sees of a step: the border between the runner and the models."""

from dataclasses import dataclass

from torch import Tensor

from engine.attention.base import AttentionBackend, AttentionMetadata, LayerCache


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """One step's flat batch. `input_ids` and `positions` ([num_tokens] int64) travel beside it.

    `logits_indices`: [num_logits] int64, the rows whose hidden states are wanted; None for all of them.
    """

    attention: AttentionMetadata
    backend: AttentionBackend
    caches: tuple[LayerCache, ...]
    logits_indices: Tensor | None
