"""Token ids to hidden states, and hidden states to logits."""

from torch import Tensor, device, dtype, empty, float32
from torch.nn import Module

from engine.layers.linear import Linear
from engine.quantization.base import Norm, QuantMethod
from kernels.ops import Operators


class Embedding(Module):
    """One row a token id. `weight`: [V, H]."""

    def __init__(self, ops: Operators, vocab_size: int, hidden_size: int, *, dtype: dtype, on: device) -> None:
        super().__init__()
        self._rows = ops.embedding
        self.weight = empty(vocab_size, hidden_size, dtype=dtype, device=on)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: [T] int64; out: [T, H]."""
        return self._rows(self.weight, input_ids)

    def targets(self, name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": self.weight}


class Head(Module):
    """The final norm and the projection to the vocabulary, for the rows whose logits are wanted.

    With `tied_to` it multiplies by the embedding's rows and has no weights of its own in a checkpoint; those are always plain.
    """

    def __init__(self, method: QuantMethod, embedding: Embedding, norm: Norm, *, tied: bool) -> None:
        super().__init__()
        vocab_size, hidden_size = embedding.weight.shape
        self._tied = tied
        parts = {"lm_head": vocab_size}
        weight = embedding.weight
        shared = weight if tied else None
        self.linear = Linear(
            method, hidden_size, parts, dtype=weight.dtype, on=weight.device, norm=norm, out_dtype=float32, shared=shared
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [N, H], before the final norm; out: [N, V] float32."""
        out: Tensor = self.linear(hidden)
        return out

    def best(self, hidden: Tensor) -> Tensor:
        """The greedy token of each row of those logits, -1 where there is none. hidden: [N, H]; out: [N] int64."""
        return self.linear.best(hidden)

    def targets(self) -> dict[str, Tensor]:
        """Empty when tied."""
        if self._tied:
            return {}
        return self.linear.targets("")
