"""A linear layer keeps its parts apart for the checkpoint and fuses what stands around its product."""

import pytest
import torch
from torch.nn import functional

from engine.layers.linear import Linear
from engine.layers.norm import make_norm
from engine.quantization.registry import head_method, method, methods
from kernels import ops, reference

CPU = torch.device("cpu")
COMPOSED = ops.for_device("cpu", "torch")
PACKED = ops.for_device("cpu")


def filled(layer: Linear) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    targets = layer.targets("mlp")
    for target in targets.values():
        target.normal_()
    return targets


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("operators", [COMPOSED, PACKED], ids=["composed", "packed"])
def test_every_fusion_is_the_composition_of_its_parts(operators, bias, normed, gated, added):
    norm = make_norm(6, 1e-5, dtype=torch.float32, on=CPU) if normed else None
    if norm is not None:
        norm.weight.normal_()
    quant = method("", operators)
    layer = Linear(quant, 6, {"gate": 5, "up": 5}, dtype=torch.float32, on=CPU, bias=bias, norm=norm, silu_mul=gated)
    parts = filled(layer)
    x, residual = torch.randn(3, 6), torch.randn(3, 5 if gated else 10)
    wide = reference.rms_norm(x, norm.weight, 1e-5) if norm is not None else x
    gate, up = (functional.linear(wide, parts[f"mlp.{name}.weight"], parts.get(f"mlp.{name}.bias")) for name in ("gate", "up"))
    expected = functional.silu(gate) * up if gated else torch.cat((gate, up), dim=-1)
    layer.finish()
    out = layer(x, residual.clone() if added else None)
    torch.testing.assert_close(out, expected + residual if added else expected, atol=1e-5, rtol=1e-5)


def test_the_parts_of_a_checkpoint_are_named_and_shaped():
    layer = Linear(method("", COMPOSED), 6, {"q_proj": 8, "k_proj": 2}, dtype=torch.bfloat16, on=CPU, bias=True)
    shapes = {name: tuple(view.shape) for name, view in layer.targets("a").items()}
    assert shapes == {"a.q_proj.weight": (8, 6), "a.q_proj.bias": (8,), "a.k_proj.weight": (2, 6), "a.k_proj.bias": (2,)}


@pytest.mark.parametrize(("operators", "names"), [(COMPOSED, ["unquantized"]), (PACKED, ["packed", "int8", "int4"])])
def test_every_registered_format_can_be_made(operators, names):
    assert [method(name, operators).name for name in methods(operators)] == names


@pytest.mark.parametrize(
    ("operators", "formats", "names"),
    [(COMPOSED, [""], ["unquantized"]), (PACKED, ["", "int8", "int4"], ["packed", "int8", "packed"])],
)
def test_the_head_is_quantised_beside_int8_alone(operators, formats, names):
    assert [head_method(name, operators, screened=False).name for name in formats] == names
    screens = ["screened" if name == "packed" and operators.pack_screen is not None else name for name in names]
    assert [head_method(name, operators, screened=True).name for name in formats] == screens
