"""config.json becomes the same model that transformers makes of it, or is refused by key."""

import json
import re
from pathlib import Path

import pytest
import transformers

from engine.errors import CheckpointError
from engine.loading.config_file import read_eos_token_ids, read_model_config
from tests.engine.models.families import FAMILIES, SMALL

BASE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SMALL}
LEAST = (
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def write(directory: Path, values: object, name: str = "config.json") -> Path:
    (directory / name).write_text(values if isinstance(values, str) else json.dumps(values))
    return directory


@pytest.mark.parametrize(("family", "overrides"), FAMILIES.values(), ids=FAMILIES)
def test_a_saved_config_is_read_as_transformers_means_it(tmp_path, family, overrides):
    theirs = getattr(transformers, f"{family}Config")(**{**SMALL, **overrides}, architectures=[f"{family}ForCausalLM"])
    theirs.save_pretrained(tmp_path)
    ours = read_model_config(tmp_path)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.rope.rope_type == theirs.rope_parameters["rope_type"]
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_absent_keys_have_transformers_defaults(tmp_path, family):
    least = {key: BASE[key] for key in LEAST} | {"architectures": [f"{family}ForCausalLM"], "max_position_embeddings": 64}
    least |= {"hidden_size": 512, "num_attention_heads": 32}
    theirs = getattr(transformers, f"{family}Config")(**least)
    ours = read_model_config(write(tmp_path, least))
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert (ours.rms_norm_eps, ours.tied) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert set(ours.sliding_windows) == {(theirs.sliding_window or 0) if family == "Mistral" else 0}


def test_the_older_form_of_rope_scaling_is_read(tmp_path):
    ours = read_model_config(write(tmp_path, {**BASE, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}))
    assert (ours.rope.rope_type, ours.rope.theta, ours.rope.factor) == ("linear", 5e5, 2.0)


YARN = {"rope_type": "yarn", "factor": 4.0}
REFUSED = {
    "unknown architecture": ({"architectures": ["GPT9"]}, "architecture 'GPT9' is not supported; supported are Llama"),
    "no architecture": ({"architectures": None}, "architectures must name the model's class"),
    "negative size": ({"hidden_size": -1}, "hidden_size must be a whole number from 1"),
    "absurd size": ({"vocab_size": 10**15}, "vocab_size must be a whole number from 1"),
    "size of text": ({"num_hidden_layers": "3"}, "num_hidden_layers must be a whole number"),
    "size of true": ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
    "missing size": ({"intermediate_size": None}, "intermediate_size must be a whole number"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "num_attention_heads (4) must be a multiple"),
    "hidden that does not divide": ({"hidden_size": 25}, "hidden_size (25) must be a multiple"),
    "odd head": ({"head_dim": 7}, "head_dim (7) must be even"),
    "epsilon NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number above 0"),
    "infinite theta": ({"rope_theta": float("inf")}, "rope_theta must be a number"),
    "other activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    "unknown rope": ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope' is not supported"),
    "rope without factor": ({"rope_scaling": {"rope_type": "linear"}}, "factor must be a number"),
    "rope of text": ({"rope_scaling": "linear"}, "rope_parameters must be an object"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "quantised as 'awq'; supported formats: none yet"),
    "odd dtype": ({"dtype": "int3"}, "dtype 'int3' is not supported"),
    "dtypes": ({"dtype": ["float32"]}, "dtype ['float32'] is not supported"),
    "layers of objects": (
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": [{}] * SMALL["num_hidden_layers"]},
        "layer_types must hold full_attention or sliding_attention",
    ),
    "yarn of half a token": (
        {"rope_scaling": YARN | {"original_max_position_embeddings": 0.5}},
        "original_max_position_embeddings",
    ),
    "yarn without turns": ({"rope_scaling": YARN | {"beta_fast": 1e-320}}, "beta_fast must be a number above 1e-09"),
    "yarn that turns nothing": ({"rope_scaling": YARN | {"rope_theta": 1.0}}, "rope_theta must be a number above 1"),
    "flag of text": ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
}


@pytest.mark.parametrize(("values", "reason"), REFUSED.values(), ids=REFUSED)
def test_nonsense_is_refused_by_file_and_key(tmp_path, values, reason):
    with pytest.raises(CheckpointError, match=re.escape(reason)) as caught:
        read_model_config(write(tmp_path, {**BASE, **values}))
    assert caught.value.file == str(tmp_path / "config.json")


TEXTS = {"{": "is not valid JSON", "[1]": "must hold a JSON object", "[" * 100_000: "is not valid JSON"}


@pytest.mark.parametrize(("text", "reason"), TEXTS.items(), ids=["cut", "list", "deep"])
def test_a_file_that_is_no_object_is_refused(tmp_path, text, reason):
    with pytest.raises(CheckpointError, match=reason):
        read_model_config(write(tmp_path, text))


def test_a_missing_config_says_what_a_directory_holds(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: is missing; a model directory holds"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("generation", "expected"), [({"eos_token_id": 5}, (5,)), ({"eos_token_id": [5, 7, 5]}, (5, 7)), ({}, (2,))]
)
def test_the_end_of_a_text_is_the_generation_configs_first(tmp_path, generation, expected):
    write(tmp_path, BASE)
    write(tmp_path, generation, "generation_config.json")
    assert read_eos_token_ids(tmp_path, 61) == expected


@pytest.mark.parametrize("value", [61, -1, "2", [2, None], True])
def test_an_end_that_is_no_token_is_refused(tmp_path, value):
    write(tmp_path, BASE)
    write(tmp_path, {"eos_token_id": value}, "generation_config.json")
    with pytest.raises(CheckpointError, match="eos_token_id must hold token ids below 61"):
        read_eos_token_ids(tmp_path, 61)
