"""Llama and its relatives of the same skeleton: Mistral (sliding window), Qwen2 (biased QKV), Qwen3 (normed heads).

They differ only in what `ModelConfig` says. A decoder layer is five calls; how each is fused is the linear's and the backend's
business. The residual stream `x` is never normed in place: each linear norms what it reads and adds to what it is given.
"""

from torch import Tensor, device, dtype
from torch.nn import Module

from engine.execution.forward_batch import ForwardBatch
from engine.layers.attention import Attention
from engine.layers.embedding import Embedding, Head
from engine.layers.linear import Linear
from engine.layers.norm import make_norm, norm_targets
from engine.layers.rotary import cos_sin_table
from engine.models.config import ModelConfig
from engine.quantization.registry import head_method, method
from kernels.ops import Operators


class Llama(Module):
    """A decoder-only transformer with RMSNorm, rotary positions, grouped heads and a SiLU-gated MLP."""

    def __init__(self, config: ModelConfig, ops: Operators, *, dtype: dtype, on: device) -> None:
        super().__init__()
        cos_sin = cos_sin_table(config.rope, config.head_dim, config.max_position).to(on)
        hidden_dtype = ops.hidden_dtype or dtype
        self.embedding = Embedding(ops, config.vocab_size, config.hidden_size, dtype=dtype, on=on)
        self.layers = tuple(DecoderLayer(config, index, cos_sin, ops, dtype=dtype, on=on) for index in range(config.num_layers))
        self.norm = make_norm(config.hidden_size, config.rms_norm_eps, dtype=hidden_dtype, on=on)
        self.head = Head(
            head_method(config.quant_method, ops, screened=config.screen_head),
            self.embedding,
            self.norm,
            tied=config.tied,
        )

    def forward(self, input_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        """input_ids, positions: [T] int64; out: [num_logits, H], before the final norm.

        Behind the last layer's attention nothing is computed for rows that nobody wants: a thirtieth of a prompt in a model of 30 layers.
        """
        x: Tensor = self.embedding(input_ids)
        for layer in self.layers[:-1]:
            x = layer(x, positions, batch, None)
        wanted: Tensor = self.layers[-1](x, positions, batch, batch.logits_indices)
        return wanted

    def compute_logits(self, hidden_rows: Tensor) -> Tensor:
        """hidden_rows: [N, H] as `forward` gave them; out: [N, V] float32."""
        logits: Tensor = self.head(hidden_rows)
        return logits

    def best_tokens(self, hidden_rows: Tensor) -> Tensor:
        """What `kernels.reference.greedy` says of `compute_logits`. hidden_rows: [N, H]; out: [N] int64."""
        return self.head.best(hidden_rows)

    def targets(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint must hold: where it is copied to."""
        found = self.embedding.targets("model.embed_tokens") | norm_targets(self.norm, "model.norm") | self.head.targets()
        for index, layer in enumerate(self.layers):
            found |= layer.targets(f"model.layers.{index}")
        return found

    def finish(self) -> None:
        """Puts the weights into the layout of their products, once all of them are loaded."""
        for layer in self.layers:
            layer.finish()
        self.head.linear.finish()


class DecoderLayer(Module):
    """norm → QKV; attention; output + residual; norm → gate/up → SiLU·mul; down + residual."""

    def __init__(self, config: ModelConfig, index: int, cos_sin: Tensor, ops: Operators, *, dtype: dtype, on: device) -> None:
        super().__init__()
        self._index = index
        quant, hidden_dtype = method(config.quant_method, ops), ops.hidden_dtype or dtype
        hidden, wide, dim, eps = config.hidden_size, config.intermediate_size, config.head_dim, config.rms_norm_eps
        q_size, kv_size = config.num_q_heads * dim, config.num_kv_heads * dim
        qkv_parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}

        self.input_norm = make_norm(hidden, eps, dtype=hidden_dtype, on=on)
        self.mlp_norm = make_norm(hidden, eps, dtype=hidden_dtype, on=on)
        self.qkv = Linear(
            quant,
            hidden,
            qkv_parts,
            bias=config.qkv_bias,
            norm=self.input_norm,
            dtype=dtype,
            hidden_dtype=hidden_dtype,
            on=on,
        )
        self.attention = Attention(
            ops,
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=dim,
            cos_sin=cos_sin,
            sliding_window=config.sliding_windows[index],
            q_norm=make_norm(dim, eps, dtype=hidden_dtype, on=on) if config.qk_norm else None,
            k_norm=make_norm(dim, eps, dtype=hidden_dtype, on=on) if config.qk_norm else None,
        )
        self.out = Linear(
            quant, q_size, {"o_proj": hidden}, bias=config.out_bias, dtype=dtype, hidden_dtype=hidden_dtype, on=on
        )
        self.gate_up = Linear(
            quant,
            hidden,
            {"gate_proj": wide, "up_proj": wide},
            bias=config.mlp_bias,
            norm=self.mlp_norm,
            silu_mul=True,
            dtype=dtype,
            hidden_dtype=hidden_dtype,
            on=on,
        )
        self.down = Linear(
            quant, wide, {"down_proj": hidden}, bias=config.mlp_bias, dtype=dtype, hidden_dtype=hidden_dtype, on=on
        )

    def forward(self, x: Tensor, positions: Tensor, batch: ForwardBatch, rows: Tensor | None) -> Tensor:
        """x: [T, H]; rows: [N] int64; out: [N, H], those rows; None: all of them."""
        qkv = self.qkv(x)
        heads = self.attention(qkv, positions, batch.backend, batch.caches[self._index], batch.attention)
        if rows is not None:
            heads, x = heads.index_select(0, rows), x.index_select(0, rows)
        x = self.out(heads, x)
        wide = self.gate_up(x)
        down: Tensor = self.down(wide, x)
        return down

    def finish(self) -> None:
        """Finishes the linears; what a product would only round is given to it rounded."""
        for linear in (self.qkv, self.out, self.gate_up, self.down):
            linear.finish()
        self.attention.out_dtype = self.out.row_dtype
        self.gate_up.give(self.down.row_dtype)

    def targets(self, prefix: str) -> dict[str, Tensor]:
        """Every tensor of this layer by its name in a checkpoint."""
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        found = self.qkv.targets(attention) | self.out.targets(attention) | self.gate_up.targets(mlp) | self.down.targets(mlp)
        found |= norm_targets(self.input_norm, f"{prefix}.input_layernorm")
        found |= norm_targets(self.mlp_norm, f"{prefix}.post_attention_layernorm")
        for norm, name in ((self.attention.q_norm, "q_norm"), (self.attention.k_norm, "k_norm")):
            if norm is not None:
                found |= norm_targets(norm, f"{attention}.{name}")
        return found
