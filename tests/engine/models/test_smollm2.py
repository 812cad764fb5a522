"""The real model through our own loader and layers says what transformers says."""

import pytest
import torch

from kernels.ops import for_device
from tests.engine.models.paged import Sequences, load
from tests.servers.model import model_dir

pytestmark = pytest.mark.model

# "What is the capital of France?" in the model's chat template, and transformers' greedy answer in float32.
PROMPT = [
    *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198),
    *(1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198),
]
ANSWER = [504, 3575, 282, 4649, 314, 7042, 30, 2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_greedy_answer_is_transformers(dtype):
    loaded = load(model_dir(), dtype=dtype)
    sequences = Sequences(loaded, 1, len(PROMPT) + len(ANSWER))
    said = [int(sequences.step({0: PROMPT})[-1].argmax())]
    while said[-1] not in loaded.plan.eos_token_ids and len(said) < len(ANSWER):
        said.append(int(sequences.step({0: said[-1:]})[-1].argmax()))
    assert said == ANSWER


def test_its_facts_are_those_of_its_config():
    loaded = load(model_dir())
    shape, plan = loaded.plan.shape, loaded.plan
    assert (shape.architecture, shape.num_layers, shape.num_q_heads, shape.num_kv_heads) == ("LlamaForCausalLM", 30, 9, 3)
    assert (shape.head_dim, shape.hidden_size, shape.vocab_size, shape.max_position) == (64, 576, 49_152, 8_192)
    assert (plan.eos_token_ids, plan.dtype, max(shape.sliding_windows)) == ((2,), torch.bfloat16, 0)
    assert loaded.num_parameters == 134_515_008
    # In bfloat16, but for the norms, which the C++ operators of a CPU take in float32.
    norm_bytes = (for_device("cpu").hidden_dtype or plan.dtype).itemsize
    assert loaded.weight_bytes == 2 * 134_515_008 + (norm_bytes - 2) * 61 * 576
