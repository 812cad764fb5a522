"""The rotary table turns by transformers' angles, for each way of scaling."""

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.layers.rotary import RopeConfig, cos_sin_table, inverse_frequencies
from engine.loading.config_file import read_model_config
from tests.engine.models.families import LLAMA3, YARN

SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": LLAMA3,
    "llama 3.1 itself": {**LLAMA3, "rope_theta": 500_000.0, "factor": 8.0, "original_max_position_embeddings": 8192},
    "yarn": YARN,
    "yarn, attention factor given": {**YARN, "attention_factor": 1.25},
    "yarn, not truncated": {**YARN, "truncate": False, "beta_fast": 20, "beta_slow": 2},
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("head_dim", [6, 64])
def test_the_table_is_transformers(tmp_path, scaling, head_dim):
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=128,
        rope_parameters=dict(scaling),
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(100)[None])
    half = head_dim // 2
    expected = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)
    ours = cos_sin_table(read_model_config(tmp_path).rope, head_dim, 100)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_an_unknown_type_is_an_error():
    with pytest.raises(ValueError, match="rope type 'spiral'"):
        inverse_frequencies(RopeConfig(rope_type="spiral"), 8)


@pytest.mark.parametrize("rows", [1, 37, 1000])
def test_a_positions_row_does_not_depend_on_how_many_there_are(rows):
    rope = RopeConfig(rope_type="yarn", theta=500_000.0, factor=4.0, original_max_position=2048, attention_factor=1.1)
    assert torch.equal(cos_sin_table(rope, 64, rows), cos_sin_table(rope, 64, 4096)[:rows])
