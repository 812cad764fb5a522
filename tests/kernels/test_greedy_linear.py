"""`greedy_linear` and `pack_screen`: the tokens that `greedy` finds among `linear`'s outputs, for every instruction set of this machine."""

import pytest
import torch
from torch import Tensor

from kernels import reference
from tests.kernels.native import native

__all__ = ["native"]

EPS = 1e-5
PLAIN = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
SHAPES = [(1000, 64), (193, 63), (1, 5), (17, 300), (16, 1), (640, 577), (100, 1033)]
"""(outputs, inputs): panels and blocks that are not full, several blocks, fewer outputs than a panel has."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(native: object, x: Tensor, weight: Tensor, norm: Tensor | None = None) -> tuple[list[int], list[int], list[int]]:
    """By the whole product's outputs; by `greedy_linear` without a screen and with one."""
    packed = native.pack(weight, PLAIN[weight.dtype], False, 0)  # type: ignore[attr-defined]
    logits = native.linear(x, packed, norm, EPS, None, None, torch.float32)  # type: ignore[attr-defined]
    whole = native.greedy(logits)  # type: ignore[attr-defined]
    fused = native.greedy_linear(x, packed, None, norm, EPS)  # type: ignore[attr-defined]
    screened = native.greedy_linear(x, packed, native.pack_screen(packed, norm), norm, EPS)  # type: ignore[attr-defined]
    return whole.tolist(), fused.tolist(), screened.tolist()


def expect_same(native: object, x: Tensor, weight: Tensor, norm: Tensor | None = None) -> list[int]:
    whole, fused, screened = tokens(native, x, weight, norm)
    assert (fused, screened) == (whole, whole)
    return whole


def coarse(weight: Tensor) -> Tensor:
    """A weight as a screen holds it."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round() * scale


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize(("out", "inputs"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 70])
def test_the_tokens_are_those_of_the_outputs(native, dtype, out, inputs, rows):
    x, weight, norm = normal(rows, inputs).to(dtype), normal(out, inputs, seed=1).to(dtype), normal(inputs, seed=2).to(dtype)
    expect_same(native, x, weight, norm)
    expect_same(native, x, weight)


def test_the_tokens_are_its_twins(native):
    x, weight, norm = normal(9, 64), normal(500, 64, seed=1), normal(64, seed=2)
    packed = reference.pack_weight(weight, "float32", False, 0)
    wanted = reference.greedy_linear(x, packed, reference.pack_screen(packed, None), norm, EPS)
    assert expect_same(native, x, weight, norm) == wanted.tolist()


@pytest.mark.parametrize("stored_as", ["int8", "int4"])
def test_quantised_weights_need_no_screen(native, stored_as):
    x, norm = normal(9, 100), normal(100, seed=2)
    packed = native.pack(normal(333, 100, seed=1), stored_as, False, 32)
    wanted = native.greedy(native.linear(x, packed, norm, EPS, None, None, torch.float32))
    assert torch.equal(native.greedy_linear(x, packed, None, norm, EPS), wanted)


@pytest.mark.parametrize("dtype", PLAIN)
def test_of_equal_outputs_the_first_is_taken(native, dtype):
    x, weight = normal(6, 96).to(dtype), normal(300, 96, seed=1).to(dtype)
    firsts = [3, 40, 77, 150, 199, 0]
    for row, first in enumerate(firsts):
        weight[[first, first + 100]] = x[row]  # a row's greatest by far
    assert expect_same(native, x, weight) == firsts
    assert expect_same(native, x, torch.ones(300, 96, dtype=dtype)) == [0] * 6


@pytest.mark.parametrize("dtype", PLAIN)
def test_outputs_that_differ_by_a_last_place_are_told_apart(native, dtype):
    x, weight = normal(8, 96).to(dtype), normal(400, 96, seed=1).to(dtype)
    x[0] = 0.0
    x[0, 17] = 1.0
    weight[30, 17] = 7.0
    weight[310] = weight[30]
    assert expect_same(native, x, weight)[0] == 30
    for above in (310, 30):
        weight[[30, 310], 17] = 7.0
        weight[above, 17] = torch.nextafter(weight[30, 17], torch.tensor(8.0, dtype=dtype))
        assert expect_same(native, x, weight)[0] == above


@pytest.mark.parametrize("dtype", PLAIN)
def test_outputs_nearer_than_a_screen_can_see_are_told_apart(native, dtype):
    """Near copies of one output: what a screen ranks first is hardly ever the answer, and many panels are looked at."""
    x = normal(40, 200).to(dtype)
    near = normal(1, 200, seed=1) * (1 + 0.02 * normal(60, 200, seed=2))
    weight = torch.cat((0.1 * normal(700, 200, seed=3), near))[
        torch.randperm(760, generator=torch.Generator().manual_seed(4))
    ].to(dtype)
    seen = (x.float() @ coarse(weight.float()).T).argmax(dim=1)
    exact = torch.tensor(expect_same(native, x, weight))
    assert (seen != exact).sum().item() >= 5


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize(("sign", "share", "wanted", "seen"), [(1.0, 0.98, 250, 400), (-1.0, 1.02, 400, 250)])
def test_a_row_along_a_screens_own_error_is_not_misled(native, dtype, sign, share, wanted, seen):
    """A screen cannot be off by more for a row of that length: it takes a rival for the greater, and the lesser for a rival."""
    weight = torch.zeros(500, 128)
    weight[250] = normal(128, seed=5)
    weight[250, 0] = 6.0
    weight = weight.to(dtype)
    error = weight[250].float() - coarse(weight[250:251].float())[0]
    x = sign * error / error.norm() * 8
    x[0] = 4.0
    x = x.to(dtype)
    # One weight alone, which a screen holds as it is.
    weight[400, 0] = share * float(x.float() @ weight[250].float()) / 4.0
    assert int((coarse(weight[[250, 400]].float()) @ x.float()).argmax()) == (seen == 400)
    assert expect_same(native, x[None], weight) == [wanted]


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_of_an_infinite_or_no_number_has_no_token_and_the_others_have_theirs(native, dtype, value):
    x, weight = normal(9, 96).to(dtype), normal(300, 96, seed=1).to(dtype)
    wanted = expect_same(native, x, weight)
    x[4, 50] = value
    assert expect_same(native, x, weight) == [*wanted[:4], -1, *wanted[5:]]


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30])
def test_weights_of_infinite_no_or_vast_numbers(native, dtype, value):
    x, weight = normal(9, 96).to(dtype), normal(300, 96, seed=1).to(dtype)
    weight[222, 33] = value
    expect_same(native, x, weight)
    weight[7:9] = value
    expect_same(native, x.abs(), weight)


def test_outputs_of_minus_infinity_alone_give_no_token(native):
    x, weight = torch.ones(3, 16), torch.full((40, 16), float("-inf"))
    assert expect_same(native, x, weight) == [-1] * 3
    weight[21] = 2.0
    assert expect_same(native, x, weight) == [21] * 3


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize("weight_scale", [1e-38, 1e-30, 1e-8, 0.0, 1e8, 1e30])
@pytest.mark.parametrize("row_scale", [1e-38, 1e-30, 1e-6, 0.0, 1e6, 1e30])
def test_numbers_of_any_magnitude(native, dtype, weight_scale, row_scale):
    x, weight = (normal(5, 300) * row_scale).to(dtype), normal(200, 300, seed=1)
    expect_same(native, x, (weight * weight_scale).to(dtype))
    weight[::3] *= weight_scale  # some outputs alone
    expect_same(native, x, weight.to(dtype))


@pytest.mark.parametrize("dtype", PLAIN)
def test_rows_with_numbers_a_thousand_times_the_others(native, dtype):
    x, weight = normal(20, 577), normal(900, 577, seed=1)
    x[:, 100] *= 1000
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.01] *= 30
    expect_same(native, x.to(dtype), weight.to(dtype))


@pytest.mark.parametrize("dtype", PLAIN)
def test_rows_that_a_screen_tells_nothing_of_stand_beside_others(native, dtype):
    """Every panel may hold such a row's answer, so that the product itself says it, of those rows together."""
    x, weight = normal(30, 256).to(dtype), 1e-3 * normal(2000, 256, seed=1)
    weight[:, 0] = 1.0
    x[::4, 1:] = 0.0
    x[::4, 0] = 1.0
    weight[1234, 0] = 1.0078125
    whole = expect_same(native, x, weight.to(dtype))
    assert whole[::4] == [1234] * 8


@pytest.mark.parametrize("dtype", PLAIN)
def test_a_rows_token_depends_on_nothing_else(native, dtype):
    x, weight, norm = normal(67, 300).to(dtype), normal(700, 300, seed=1).to(dtype), normal(300, seed=2).to(dtype)
    packed = native.pack(weight, PLAIN[dtype], False, 0)
    screen = native.pack_screen(packed, None)
    alone = torch.cat([native.greedy_linear(x[i : i + 1].contiguous(), packed, screen, norm, EPS) for i in range(67)])
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        together = native.greedy_linear(x, packed, screen, norm, EPS)
        torch.set_num_threads(threads)
        assert torch.equal(alone, together), count


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize("inputs", [40, 576, 3300])
def test_a_few_inputs_may_be_a_hundred_times_the_others(native, dtype, inputs):
    """Which of them they are, norm weights and weights say; or nothing does."""
    x, weight, norm = normal(20, inputs), normal(1500, inputs, seed=1), normal(inputs, seed=2)
    norm[3::17] *= 100
    weight[:, 5::19] *= 10
    x[::2, 7::23] *= 100
    expect_same(native, x.to(dtype), weight.to(dtype), norm.to(dtype))
    expect_same(native, x.to(dtype), weight.to(dtype))


@pytest.mark.parametrize("dtype", PLAIN)
def test_what_rounding_a_row_takes_from_an_output_it_may_have_had(native, dtype):
    """All of a row's numbers but one lie just below the middle between two of 8 bits, and output 1234 has the same weight for each."""
    weight = 1e-3 * normal(2000, 256, seed=1)
    weight[0, :48] = 100.0  # inputs that are kept finely, and are 0
    weight[1234] = 1.0
    weight[5, 255] = 3.15
    x = torch.full((3, 256), 1.49)
    x[:, 255], x[:, :48] = 127.0, 0.0
    assert expect_same(native, x.to(dtype), weight.to(dtype)) == [1234] * 3


def test_no_rows_have_no_tokens(native):
    assert expect_same(native, torch.zeros(0, 16), torch.zeros(32, 16)) == []


def wrong_calls(native: object) -> dict[str, tuple[str, dict[str, object]]]:
    """What is wrong: (what the message says, the arguments that differ)."""
    pack, pack_screen = native.pack, native.pack_screen  # type: ignore[attr-defined]
    other = pack_screen(pack(torch.zeros(65, 48), "float32", False, 32), None)
    return {
        "inputs": (r"x must be \[rows, 48\]", {"x": torch.zeros(2, 47)}),
        "dtype": ("x must be float32 or bfloat16, not Half", {"x": torch.zeros(2, 48, dtype=torch.float16)}),
        "norm": (r"norm_weight must be \[48\]", {"norm_weight": torch.zeros(47)}),
        "gated": ("a gated layer's outputs are no logits", {"packed": pack(torch.zeros(64, 48), "float32", True, 32)}),
        "screen": ("screen must be what `pack_screen` made of packed", {"screen": other}),
        "no screen": ("screen must be what `pack_screen` made", {"screen": pack(torch.zeros(64, 48), "float32", False, 32)}),
        "a screen": ("packed must be what `pack` made, not a screen", {"packed": other}),
    }  # fmt: skip


@pytest.mark.parametrize("wrong", ["inputs", "dtype", "norm", "gated", "screen", "no screen", "a screen"])
def test_arguments_that_do_not_fit_are_refused(native, wrong):
    message, differing = wrong_calls(native)[wrong]
    packed = native.pack(torch.zeros(64, 48), "float32", False, 32)
    arguments = {"x": torch.zeros(2, 48), "packed": packed, "screen": None, "norm_weight": None} | differing
    with pytest.raises(RuntimeError, match=message):
        native.greedy_linear(*arguments.values(), EPS)


@pytest.mark.parametrize(("stored_as", "gated"), [("int8", False), ("int4", False), ("bfloat16", True)])
def test_a_screen_is_made_of_plain_weights_alone(native, stored_as, gated):
    packed = native.pack(torch.zeros(64, 48), stored_as, gated, 32)
    with pytest.raises(RuntimeError, match="a screen is made of weights in float32 or bfloat16, not gated"):
        native.pack_screen(packed, None)


def test_a_screen_is_no_weight_of_a_linear(native):
    screen = native.pack_screen(native.pack(torch.zeros(64, 48), "float32", False, 32), None)
    with pytest.raises(RuntimeError, match="packed must be what `pack` made, not a screen"):
        native.linear(torch.zeros(2, 48), screen, None, EPS, None, None, torch.float32)
