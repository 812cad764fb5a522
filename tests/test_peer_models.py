"""The models that peers are compared on: made ones, and GGUF files of them."""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.bench.peers import models
from tests.bench.peers.__main__ import parse
from tests.bench.peers.ggufs import ensure_gguf, write_gguf


def test_a_gguf_file_holds_the_checkpoints_values_with_rotated_rows_side_by_side(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": 32,
        "max_position_embeddings": 64,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "rms_norm_eps": 1e-5,
        "head_dim": 32,
        "rope_parameters": {"rope_theta": 10000.0},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    query, value = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16()
    stem = "model.layers.0.self_attn"
    save_file({f"{stem}.q_proj.weight": query, f"{stem}.v_proj.weight": value}, tmp_path / "model.safetensors")
    write_gguf(tmp_path, tmp_path / "model.gguf", "F16", title="tiny")
    read = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert np.array_equal(read["blk.0.attn_v.weight"], value.half().numpy())
    pairs = [row for i in range(16) for row in (i, i + 16)]
    assert np.array_equal(read["blk.0.attn_q.weight"], query[pairs].half().numpy())


TINY_SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 128,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
}


def small(monkeypatch: pytest.MonkeyPatch, cache: Path, model_type: str, **changed: Any) -> Path:
    """A made model, `tiny`, in a cache of its own beside a demo's model that is a tokenizer alone."""
    demo = cache / "models" / models.DEMO
    demo.mkdir(parents=True)
    (demo / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("SLUICE_CACHE", str(cache))
    monkeypatch.setitem(models.MADE, "tiny", models.Made(model_type=model_type, shape=TINY_SHAPE | changed))
    return models.ensure_model("tiny")


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_made_model_has_its_shape_bfloat16_weights_and_the_demos_tokenizer(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small(monkeypatch, tmp_path, model_type)
    config = json.loads((made / "config.json").read_text())
    assert {name: config[name] for name in TINY_SHAPE} == TINY_SHAPE
    assert (config["model_type"], config["dtype"], models.weights_of("tiny")) == (model_type, "bfloat16", "random")
    weights = load_file(made / "model.safetensors")
    assert {values.dtype for values in weights.values()} == {torch.bfloat16}
    assert ("model.layers.1.self_attn.q_proj.bias" in weights) == (model_type == "qwen2")
    assert (made / "tokenizer.json").read_text() == "{}"
    assert sorted(entry.name for entry in made.parent.iterdir()) == [".tiny.lock", "tiny"]


def test_a_made_model_is_the_same_wherever_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    one = load_file(small(monkeypatch, tmp_path / "one", "qwen2") / "model.safetensors")
    other = load_file(small(monkeypatch, tmp_path / "other", "qwen2") / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(values.float().std() > 0 for name, values in one.items() if name.endswith(".bias"))


def test_the_shapes_are_those_of_the_published_models() -> None:
    """Their published sizes: 494 and 1236 million parameters, the embedding counted once."""
    sizes = {}
    for name, made in models.MADE.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(made.model_type, **made.shape))
        sizes[name] = round(sum(values.numel() for values in model.parameters()) / 1e6)
    assert sizes == {"qwen2.5-0.5b": 494, "llama-3.2-1b": 1236}


def test_a_qwen2_model_becomes_a_gguf_file_with_biases_and_rows_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small(monkeypatch, tmp_path, "qwen2")
    config = json.loads((made / "config.json").read_text())
    config.pop("head_dim")
    (made / "config.json").write_text(json.dumps(config))
    file = ensure_gguf("tiny", "Q8_0")
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    read = {tensor.name: tensor for tensor in reader.tensors}
    weights = load_file(made / "model.safetensors")
    layers = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    expected = {f"blk.{i}.{name}.weight" for i in range(2) for name in layers}
    expected |= {f"blk.{i}.attn_{name}.bias" for i in range(2) for name in "qkv"}
    assert set(read) == expected | {"token_embd.weight", "output_norm.weight"}
    assert file.name == "tiny.Q8_0.gguf"
    assert [fields[name] for name in ("general.architecture", "qwen2.rope.freq_base", "qwen2.rope.dimension_count")] == [
        "qwen2",
        1e6,
        32,
    ]
    query, bias = read["blk.1.attn_q.weight"], read["blk.1.attn_q.bias"]
    theirs = weights["model.layers.1.self_attn.q_proj.weight"].float().numpy()
    assert np.array_equal(np.array(query.data), quants.quantize(theirs, gguf.GGMLQuantizationType.Q8_0))
    assert bias.tensor_type == gguf.GGMLQuantizationType.F32
    assert np.array_equal(np.array(bias.data), weights["model.layers.1.self_attn.q_proj.bias"].float().numpy())


def test_a_rotation_that_a_gguf_file_would_not_say_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, tmp_path, "llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ValueError, match="a rotation of type linear is not written"):
        ensure_gguf("tiny", "F16")


def test_a_model_that_nobody_knows_is_refused_with_those_that_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["peers", "--model", "gpt-2"])
    with pytest.raises(SystemExit):
        parse()
    said = capsys.readouterr().err
    assert all(name in said for name in ("gpt-2", models.DEMO, "qwen2.5-0.5b", "llama-3.2-1b"))
