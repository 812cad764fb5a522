"""From a directory to a model: whole or sharded, in any dtype, or refused by name."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError
from engine.layers.rotary import cos_sin_table
from engine.loading import LoadedModel, checkpoint, load_model, plan_load
from kernels.ops import for_device
from tests.engine.models.families import save
from tests.engine.models.paged import CPU, Sequences
from tests.engine.models.paged import load as load_for


@pytest.fixture
def model_dir(tmp_path) -> Path:
    save(tmp_path / "model", "Llama", {})
    return tmp_path / "model"


def change(model_dir: Path, edit) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    edit(tensors)
    save_file(tensors, model_dir / "model.safetensors")


def load(model_dir: Path, **settings: str | int) -> LoadedModel:
    """For the composed operators, which leave each tensor as it was read."""
    return load_for(model_dir, cpu_isa="torch", **settings)


def weights(loaded) -> dict[str, torch.Tensor]:
    return loaded.model.targets()


def test_every_tensor_is_the_one_of_the_file(model_dir):
    stored = load_file(model_dir / "model.safetensors")
    found = weights(load(model_dir))
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)


def test_tensors_larger_than_the_staging_buffer_arrive_whole(model_dir, monkeypatch):
    monkeypatch.setattr(checkpoint, "STAGING_BYTES", 64)
    stored = load_file(model_dir / "model.safetensors")
    found = weights(load(model_dir))
    assert all(torch.equal(found[name], stored[name]) for name in stored)


def test_shards_give_the_same_model_as_one_file(model_dir, tmp_path):
    save(tmp_path / "sharded", "Llama", {}, max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    one, many = weights(load(model_dir)), weights(load(tmp_path / "sharded"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_the_dtype_is_the_one_that_was_asked_for(model_dir, name):
    dtype = getattr(torch, name)
    stored = load_file(model_dir / "model.safetensors")
    found = weights(load(model_dir, dtype=name))
    assert all(torch.equal(found[key], stored[key].to(dtype)) for key in stored)


def test_auto_takes_the_checkpoints_dtype(model_dir):
    edit_config(model_dir, dtype="bfloat16")
    assert load(model_dir).plan.dtype == torch.bfloat16


def test_auto_takes_the_weights_dtype_where_the_config_is_silent(model_dir):
    edit_config(model_dir, dtype=None)
    change(model_dir, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    assert load(model_dir).plan.dtype == torch.bfloat16


def test_auto_widens_float16_on_a_cpu(model_dir):
    edit_config(model_dir, dtype="float16")
    assert load(model_dir).plan.dtype == torch.float32


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_float16_is_refused_for_the_cpp_operators_before_anything_is_allocated(model_dir, load_format):
    config = EngineConfig(model_dir=str(model_dir), load_format=load_format, dtype="float16")
    with pytest.raises(ConfigError, match=r"model\.dtype is float16, but the C\+\+ operators .* set it to auto") as caught:
        plan_load(config, CPU, for_device("cpu"))
    assert caught.value.field == "model.dtype"


def test_progress_rises_to_one(model_dir):
    shares: list[float] = []
    operators = for_device("cpu")
    plan = plan_load(EngineConfig(model_dir=str(model_dir)), CPU, operators)
    load_model(plan, 64, CPU, operators, lambda share, what: shares.append(share))
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert len(shares) > 10


def test_dummy_needs_no_weights_and_repeats_itself(model_dir):
    (model_dir / "model.safetensors").unlink()
    first, second = (load(model_dir, load_format="dummy", dtype="float32") for _ in range(2))
    assert all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(first).items())
    logits = Sequences(first, 1, 8).step({0: [1, 2, 3]})
    assert bool(logits.isfinite().all())
    assert float(logits.std()) > 0


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize(("max_positions", "rows"), [(64, 64), (16, 16), (65, 64)])
def test_the_rotary_table_is_as_long_as_the_longest_sequence(model_dir, monkeypatch, load_format, max_positions, rows):
    tables = []

    def recorded(*arguments):
        tables.append(cos_sin_table(*arguments))
        return tables[-1]

    monkeypatch.setattr("engine.models.llama.cos_sin_table", recorded)
    plan = plan_load(EngineConfig(model_dir=str(model_dir), load_format=load_format), CPU, for_device("cpu"))
    loaded = load_model(plan, max_positions, CPU, for_device("cpu"))
    assert (len(tables[-1]), loaded.plan.shape.max_position) == (rows, 64)


def test_a_spare_head_of_a_tied_model_is_passed_over(tmp_path):
    save(tmp_path, "Llama", {"tie_word_embeddings": True})
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(61, 24)}))
    assert "lm_head.weight" not in weights(load(tmp_path))


DOWN = "model.layers.1.mlp.down_proj.weight"
DAMAGE = {
    "missing": (lambda tensors: tensors.pop(DOWN), "is in no \\*.safetensors file"),
    "shape": (
        lambda tensors: tensors.update({DOWN: torch.zeros(24, 41)}),
        r"has shape \[24, 41\], config.json calls for \[24, 40\]",
    ),
    "dtype": (lambda tensors: tensors.update({DOWN: torch.zeros(24, 40, dtype=torch.int8)}), "no plain float"),
}


@pytest.mark.parametrize(("edit", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_tensor_that_does_not_fit_is_named(model_dir, edit, reason):
    change(model_dir, edit)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(model_dir)
    assert caught.value.tensor == DOWN


def test_a_tensor_too_many_is_named(model_dir):
    change(model_dir, lambda tensors: tensors.update({"model.layers.3.mlp.down_proj.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="is not part of the model") as caught:
        load(model_dir)
    assert caught.value.tensor == "model.layers.3.mlp.down_proj.weight"


def test_a_truncated_file_is_refused_before_anything_is_allocated(model_dir, monkeypatch):
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    monkeypatch.setattr(torch, "empty", lambda *args, **options: pytest.fail("allocated"))
    with pytest.raises(CheckpointError, match="truncated"):
        load(model_dir)


def test_a_tensor_in_two_files_is_refused(model_dir):
    (model_dir / "other.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"stands in model\.safetensors too"):
        load(model_dir)


INDEXES = {
    "path outside": ({"weight_map": {"a": "../x.safetensors"}}, "only *.safetensors beside the index are read"),
    "file missing": ({"weight_map": {"a": "gone.safetensors"}}, "is missing, though model.safetensors.index.json lists it"),
    "tensor missing": ({"weight_map": {"a": "model.safetensors"}}, "tensor a: does not hold it"),
    "no map": ({"weight_map": ["a"]}, "weight_map must map tensor names to file names"),
}


@pytest.mark.parametrize(("index", "reason"), INDEXES.values(), ids=INDEXES)
def test_a_broken_index_is_refused(model_dir, index, reason):
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        load(model_dir)


OTHERS = {
    "pytorch_model.bin": "pickles are never read",
    "model.gguf": "sluice model import FILE DIR",
    "README.md": "holds no *.safetensors file",
}


@pytest.mark.parametrize(("name", "reason"), OTHERS.items(), ids=OTHERS)
def test_a_directory_without_safetensors_says_what_to_do(model_dir, name, reason):
    (model_dir / "model.safetensors").unlink()
    (model_dir / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        load(model_dir)


def test_a_directory_that_is_none_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: is no directory"):
        load(tmp_path / "nowhere")


def edit_config(model_dir: Path, **values: object) -> None:
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
