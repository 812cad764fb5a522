"""Which backend computes attention: by name, by device, by what the C++ operators take."""

from dataclasses import replace

import pytest
import torch

from engine.attention.base import KVCacheSpec
from engine.attention.registry import check_backend, cpu_refusal, make_backend
from engine.errors import ConfigError
from kernels.ops import for_device

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SPEC = KVCacheSpec(num_layers=1, num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "cpu_paged"),
        ({"dtype": torch.float32}, "cpu_paged"),
        ({"dtype": torch.int8}, "cpu_paged"),
        ({"dtype": torch.float16}, "torch_paged"),
        ({"head_dim": 10}, "torch_paged"),
        ({"block_size": 4}, "torch_paged"),
    ],
)
def test_auto_on_a_cpu_is_cpp_for_the_shapes_that_it_takes(change, name):
    assert make_backend("auto", CPU, for_device("cpu"), replace(SPEC, **change)).name == name


def test_without_the_operators_auto_is_torch():
    plain = for_device("cpu", "torch")
    assert make_backend("auto", CPU, plain, SPEC).name == "torch_paged"
    assert cpu_refusal(plain, SPEC) == "plain torch, as configured"


def test_cpp_by_name_is_refused_for_a_shape_that_it_does_not_take():
    with pytest.raises(ConfigError, match="cpu_paged cannot be had: blocks of 4 tokens"):
        make_backend("cpu_paged", CPU, for_device("cpu"), replace(SPEC, block_size=4))


@pytest.mark.parametrize("name", ["auto", "triton_paged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_that_tritons_kernels_do_not_take_are_refused_before_a_step(name, dtype):
    plain = for_device("cpu", "torch")
    assert make_backend(name, GPU, plain, replace(SPEC, head_dim=256, dtype=dtype)).name == "triton_paged"
    with pytest.raises(ConfigError, match=r"triton_paged cannot compute heads of 258 numbers \(up to 256") as raised:
        make_backend(name, GPU, plain, replace(SPEC, head_dim=258, dtype=dtype))
    assert raised.value.field == "engine.attention_backend"
    assert make_backend("torch_paged", GPU, plain, replace(SPEC, head_dim=258, dtype=dtype)).name == "torch_paged"


@pytest.mark.parametrize(
    ("name", "on", "isa", "change", "why"),
    [
        ("auto", CPU, "torch", {}, "torch_paged: plain torch, as configured"),
        ("torch_paged", CPU, "auto", {}, "torch_paged: as configured, on cpu"),
        ("auto", CPU, "auto", {"block_size": 4}, "torch_paged: blocks of 4 tokens"),
        ("auto", GPU, "torch", {}, "triton_paged: as configured, on cuda"),
    ],
)
def test_a_cache_of_bytes_is_for_cpp_alone(name, on, isa, change, why):
    with pytest.raises(ConfigError, match=f"kv_cache_dtype int8 needs .* attends by {why}") as raised:
        make_backend(name, on, for_device("cpu", isa), replace(SPEC, dtype=torch.int8, **change))
    assert raised.value.field == "engine.kv_cache_dtype"


@pytest.mark.parametrize(
    ("name", "on", "message"),
    [
        ("flash", CPU, "attention_backend 'flash' is unknown; known are auto, torch_paged, cpu_paged, triton_paged"),
        ("triton_paged", CPU, "needs a GPU"),
        ("cpu_paged", GPU, "cpu_paged is for a CPU, not cuda:0"),
    ],
)
def test_a_backend_that_cannot_run_here_is_refused(name, on, message):
    with pytest.raises(ConfigError, match=message):
        check_backend(name, on)
