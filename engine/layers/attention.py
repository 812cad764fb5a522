"""The attention of a decoder layer: splits the fused projection, norms the heads where a model does, and asks the backend."""

from torch import Tensor, dtype
from torch.nn import Module

from engine.attention.base import AttentionBackend, AttentionMetadata, LayerCache
from engine.quantization.base import Norm
from kernels.ops import Operators


class Attention(Module):
    """RoPE, KV write and paged attention of one layer.

    cos_sin: [max_positions, D] float32, shared by the layers. `sliding_window` in tokens, 0 = none. `q_norm` and `k_norm`
    are over the head size (Qwen3). `out_dtype`, which may be set later: the result's, None for the heads'.
    """

    def __init__(
        self,
        ops: Operators,
        *,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        cos_sin: Tensor,
        sliding_window: int = 0,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
    ) -> None:
        super().__init__()
        self._ops = ops
        self._head_dim = head_dim
        self._num_heads = [num_q_heads, num_kv_heads, num_kv_heads]
        self._cos_sin = cos_sin
        self._scale = head_dim**-0.5
        self._sliding_window = sliding_window
        self.q_norm, self.k_norm = q_norm, k_norm
        self.out_dtype: dtype | None = None

    def forward(
        self, qkv: Tensor, positions: Tensor, backend: AttentionBackend, cache: LayerCache, metadata: AttentionMetadata
    ) -> Tensor:
        """qkv: [T, (Hq + 2 Hkv) * D]; positions: [T] int64; out: [T, Hq * D]. T is nowhere said as a number: a recorded step is run
        with others."""
        q, k, v = qkv.view(-1, sum(self._num_heads), self._head_dim).split(self._num_heads, dim=1)
        q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm)
        out = backend.forward(
            q, k, v, self._cos_sin, positions, cache, metadata, self._scale, self._sliding_window, self.out_dtype
        )
        return out.view(-1, self._num_heads[0] * self._head_dim)

    def _normed(self, heads: Tensor, norm: Norm | None) -> Tensor:
        """[T, heads, D]: each head is a row of its own to the operator."""
        if norm is None:
            return heads
        apart = heads if heads.is_contiguous() else heads.clone()
        return self._ops.rms_norm(apart.view(-1, self._head_dim), norm.weight, norm.eps).view(-1, *heads.shape[1:])
