"""The C++ linears and norms against their plain-torch twins, for every instruction set that this machine can run."""

import itertools
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.cpu import choose
from kernels.cpu.build import runnable
from tests.kernels.native import native
from tests.kernels.tolerance import assert_as_exact_as_torch

__all__ = ["native"]
FORMATS = {torch.float32: ("float32", "int8", "int4"), torch.bfloat16: ("bfloat16", "int8", "int4")}
EPS = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call: x [rows, in], weight [out, in] and what stands around the product, all in one dtype."""

    x: Tensor
    weight: Tensor
    norm_weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    gated: bool
    group: int = 32

    def run(self, operators: object, stored_as: str, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """By the operators of `torch.ops.sluice_cpu`, or of `kernels.reference`."""
        pack = getattr(operators, "pack_weight", None) or operators.pack  # type: ignore[attr-defined]
        packed = pack(self.weight, stored_as, self.gated, self.group)
        return operators.linear(self.x, packed, self.norm_weight, EPS, self.bias, self.residual, out_dtype)  # type: ignore[attr-defined]

    def to(self, dtype: torch.dtype) -> "Case":
        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        return Case(
            x=self.x.to(dtype), weight=self.weight.to(dtype), norm_weight=cast(self.norm_weight), bias=cast(self.bias),
            residual=cast(self.residual), gated=self.gated, group=self.group,
        )  # fmt: skip

    def row(self, i: int) -> "Case":
        residual = None if self.residual is None else self.residual[i : i + 1].contiguous()
        return Case(
            x=self.x[i : i + 1].contiguous(), weight=self.weight, norm_weight=self.norm_weight, bias=self.bias,
            residual=residual, gated=self.gated, group=self.group,
        )  # fmt: skip


def make_case(
    rows: int, out: int, inputs: int, *, around: int = 0b1111, gated: bool = False, group: int = 32, seed: int = 0
) -> Case:
    """`around`: bits for norm, bias, residual."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    return Case(
        x=normal(rows, inputs),
        weight=normal(out, inputs) * inputs**-0.5,
        norm_weight=normal(inputs) if around & 1 else None,
        bias=normal(out) if around & 2 else None,
        residual=normal(rows, out // 2 if gated else out) if around & 4 else None,
        gated=gated,
        group=group,
    )


def assert_close(native: object, case: Case, dtype: torch.dtype, stored_as: str) -> None:
    """Against the twin in float32; the yardstick is plain torch, which rounds each part to the working type."""
    mine = case.to(dtype)
    exact = mine.to(torch.float32)
    stored = reference.pack_weight(mine.weight, stored_as, mine.gated, mine.group, byte_limit=native.byte_limit())  # type: ignore[attr-defined]
    wanted = reference.linear(exact.x, stored, exact.norm_weight, EPS, exact.bias, exact.residual, None)
    plain = wanted.to(dtype)
    if stored_as in ("float32", "bfloat16"):
        x = mine.x if mine.norm_weight is None else reference.rms_norm(mine.x, mine.norm_weight, EPS)
        plain = torch.nn.functional.linear(x, mine.weight, mine.bias)
        plain = reference.silu_mul(plain) if mine.gated else plain
        plain = plain if mine.residual is None else plain + mine.residual
    actual = mine.run(native, stored_as)
    if stored_as in ("float32", "bfloat16"):
        assert_as_exact_as_torch(actual, plain, wanted)
    else:
        # A sum that falls on the other side of a half moves its input by one step of 127: rare, small, and not to be told apart.
        step = mine.weight.float().abs().amax() * mine.run(reference, stored_as).float().abs().amax() / 64
        assert torch.isfinite(actual).all()
        assert (actual.float() - wanted).abs().mean().item() <= 2e-3 * (1 + wanted.abs().mean().item())
        assert (actual.float() - wanted).abs().max().item() <= step.item() + 0.05 * wanted.abs().max().item()


@pytest.mark.parametrize(("dtype", "stored_as"), [(dtype, name) for dtype, names in FORMATS.items() for name in names])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13, 63, 100])
@pytest.mark.parametrize(
    ("out", "inputs", "gated"), [(96, 64, False), (100, 63, False), (1, 1, False), (130, 37, True), (49, 257, False)]
)
def test_a_linear_is_its_twin(native, dtype, stored_as, rows, out, inputs, gated):
    assert_close(native, make_case(rows, out, inputs, gated=gated), dtype, stored_as)


@pytest.mark.parametrize("stored_as", FORMATS[torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 6, 20])
@pytest.mark.parametrize("inputs", [256, 513, 1033])
def test_inputs_of_several_blocks_are_all_summed(native, stored_as, rows, inputs):
    assert_close(native, make_case(rows, 20, inputs, gated=True), torch.bfloat16, stored_as)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("around", range(8))
def test_whatever_stands_around_the_product(native, around, gated):
    for dtype in FORMATS:
        assert_close(native, make_case(3, 38, 40, around=around, gated=gated), dtype, FORMATS[dtype][0])


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("inputs", [100, 600])
@pytest.mark.parametrize("gated", [False, True])
def test_a_row_is_bit_for_bit_the_same_alone_and_in_any_batch_with_any_number_of_threads(native, dtype, gated, inputs):
    threads = torch.get_num_threads()
    for stored_as in FORMATS[dtype]:
        case = make_case(67, 190, inputs, gated=gated).to(dtype)
        alone = torch.cat([case.row(i).run(native, stored_as) for i in range(67)])
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            together = case.run(native, stored_as)
            torch.set_num_threads(threads)
            assert torch.equal(alone, together), (stored_as, count)


@pytest.mark.parametrize(("dtype", "stored_as"), [(dtype, name) for dtype, names in FORMATS.items() for name in names])
def test_rows_of_several_blocks_are_as_they_are_alone(native, dtype, stored_as):
    case = make_case(500, 40, 64).to(dtype)
    together = case.run(native, stored_as)
    for i in (0, 239, 240, 241, 499):
        assert torch.equal(together[i], case.row(i).run(native, stored_as)[0])


@pytest.mark.parametrize(("dtype", "stored_as"), [(dtype, name) for dtype, names in FORMATS.items() for name in names])
@pytest.mark.parametrize(("rows", "inputs"), [(9, 22_000), (37, 5_121), (242, 4_099), (250, 3_000)])
@pytest.mark.parametrize(("out", "gated"), [(250, False), (260, True), (130, True)])
def test_rows_multiplied_in_parts_of_their_inputs_are_as_they_are_alone(native, dtype, stored_as, rows, inputs, out, gated):
    case = make_case(rows, out, inputs, gated=gated).to(dtype)
    together = case.run(native, stored_as)
    for i in {0, 8, rows // 2, min(rows, 240) - 1, rows - 1}:
        assert torch.equal(together[i], case.row(i).run(native, stored_as)[0]), i


def packed_format(packed: Tensor) -> int:
    """`Format` of the header (kernels/cpu/operators.h)."""
    return int.from_bytes(bytes(packed[4:8].tolist()), "little")


@pytest.mark.parametrize("isa", runnable())
def test_weights_that_fixed_point_would_hold_badly_stay_in_bf16(isa):
    choose(isa)
    fixed = {"avx2": 4, "avx512_vnni": 6}.get(isa, 1)  # the formats' numbers in the header
    usual = make_case(1, 50, 576).weight.bfloat16()
    lone, tiny, sparse, huge = (usual.clone() for _ in range(4))
    lone[20, 7] = 1000.0
    tiny[20] *= 1e-36
    sparse[20, 100:] = 0.0
    huge[20] = 3e38
    pack = torch.ops.sluice_cpu.pack
    assert [packed_format(pack(weight, "bfloat16", False, 0)) for weight in (usual, tiny, sparse, huge)] == [fixed] * 4
    assert packed_format(pack(lone, "bfloat16", False, 0)) == 1
    sparse[20, 1:] *= 1e-4
    assert packed_format(pack(sparse, "bfloat16", False, 0)) == 1
    choose("auto")


def test_a_row_of_an_infinite_or_no_number_leaves_the_others_alone(native):
    for (dtype, formats), value, i in itertools.product(FORMATS.items(), (float("nan"), float("inf")), range(3)):
        case = make_case(9, 64, 48).to(dtype)
        wanted = case.run(native, formats[i])
        case.x[4, 7] = value
        spoilt = case.run(native, formats[i])
        others = [0, 1, 2, 3, 5, 6, 7, 8]
        assert torch.equal(spoilt[others], wanted[others])
        assert not torch.isfinite(spoilt[4]).any()


@pytest.mark.parametrize("stored_as", ["int8", "int4"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_bytes_are_summed_exactly(native, sign, stored_as):
    """Sums of 16 bits would not hold them, were weights of 8 bits not limited and those of 4 not summed few at a time."""
    packed = native.pack(torch.full((33, 512), sign), stored_as, False, 64)
    out = native.linear(torch.ones(5, 512), packed, None, EPS, None, None, None)
    torch.testing.assert_close(out, torch.full((5, 33), sign * 512), atol=0.0, rtol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("inputs", [16, 256, 1000])
def test_the_largest_numbers_in_fixed_point_are_summed_exactly(native, sign, inputs):
    """The largest weight below a power of two and equal inputs, the most that a sum of 32 bits has to hold."""
    weight = torch.full((33, inputs), 1.9921875 * sign, dtype=torch.bfloat16)
    packed = native.pack(weight, "bfloat16", False, 0)
    out = native.linear(torch.ones(5, inputs), packed, None, EPS, None, None, None)
    torch.testing.assert_close(out, torch.full((5, 33), 1.9921875 * sign * inputs), atol=0.0, rtol=1e-6)


@pytest.mark.parametrize("outliers", ["weights", "inputs", "both"])
def test_a_bf16_product_is_as_exact_beside_numbers_a_thousand_times_larger(native, outliers):
    """One in a hundred; an error is measured against the magnitudes that were summed, as bfloat16's own rounding of them is."""
    draw = torch.Generator().manual_seed(0)
    case = make_case(9, 130, 900, around=0, seed=3)
    for tensor, name in ((case.weight, "weights"), (case.x, "inputs")):
        if outliers in (name, "both"):
            tensor[torch.rand(tensor.shape, generator=draw) < 0.01] *= 1000
    case = case.to(torch.bfloat16)
    exact = case.x.double() @ case.weight.double().T
    summed = case.x.double().abs() @ case.weight.double().abs().T
    actual = case.run(native, "bfloat16", out_dtype=torch.float32).double()
    assert ((actual - exact).abs() / summed).max().item() < 2.0**-9


def test_weights_and_inputs_of_any_magnitude_are_multiplied(native):
    for weight_scale, input_scale in ((1e-30, 1e10), (1e30, 1e-10), (1e-8, 1e-8), (0.0, 1.0), (1.0, 0.0), (1.0, 1e-38)):
        case = make_case(3, 40, 300, around=0)
        case.weight.mul_(weight_scale)
        case.x.mul_(input_scale)
        case = case.to(torch.bfloat16)
        wanted = case.x.double() @ case.weight.double().T
        actual = case.run(native, "bfloat16", out_dtype=torch.float32).double()
        torch.testing.assert_close(actual, wanted, rtol=0.0, atol=1e-35 + 0.02 * wanted.abs().max().item())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_weight_of_an_infinite_or_no_number_spoils_its_output_alone(native, dtype, value):
    case = make_case(4, 40, 300, around=0).to(dtype)
    wanted = case.run(native, FORMATS[dtype][0])
    case.weight[17, 123] = value
    spoilt = case.run(native, FORMATS[dtype][0])
    assert not torch.isfinite(spoilt[:, 17]).any()
    others = torch.arange(40) != 17
    assert torch.equal(spoilt[:, others], wanted[:, others])


@pytest.mark.parametrize("stored_as", ["int8", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_so_it_does_in_few_bits(native, value, stored_as):
    case = make_case(4, 40, 300, around=0)
    wanted = case.run(native, stored_as)
    case.weight[17, 123] = value
    spoilt = case.run(native, stored_as)
    assert not torch.isfinite(spoilt[:, 17]).any()
    others = torch.arange(40) != 17
    assert torch.equal(spoilt[:, others], wanted[:, others])


def test_no_rows_give_no_rows(native):
    assert make_case(0, 32, 16).run(native, "float32").shape == (0, 32)


@pytest.mark.parametrize(("out", "inputs", "gated"), [(96, 64, False), (70, 63, False), (130, 608, True), (49, 1, False)])
def test_rows_may_be_given_rounded_where_they_are_rounded_anyway(native, out, inputs, gated):
    for rows in (1, 2, 3, 9, 70):
        case = make_case(rows, out, inputs, around=0b110, gated=gated)
        for stored_as in ("bfloat16", "float32", "int8", "int4"):
            packed = native.pack(case.weight.bfloat16(), stored_as, gated, 32)
            around = (packed, None, EPS, case.bias, case.residual, torch.float32)
            rounded = case.x.bfloat16()
            given = native.linear(rounded, *around)
            assert torch.equal(given, native.linear(rounded.float(), *around)), (rows, stored_as)
            if native.rounds_rows(packed):
                assert torch.equal(given, native.linear(case.x, *around)), (rows, stored_as)


def test_rows_of_bf16_weights_are_rounded_where_the_processor_multiplies_bf16(native, request):
    packed = {name: native.pack(normal_weight(), name, False, 32) for name in ("bfloat16", "float32", "int8", "int4")}
    rounding = {name for name, one in packed.items() if native.rounds_rows(one)}
    assert rounding == ({"bfloat16"} if request.node.callspec.params["native"] in ("avx512_bf16", "amx") else set())


def normal_weight() -> Tensor:
    return torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("stored_as", ["bfloat16", "float32", "int8", "int4"])
def test_a_result_is_rounded_to_what_is_asked_for(native, stored_as):
    for dtype in FORMATS:
        case = make_case(5, 130, 96, gated=True).to(dtype)
        whole = case.run(native, stored_as, out_dtype=torch.float32)
        assert torch.equal(case.run(native, stored_as, out_dtype=torch.bfloat16), whole.bfloat16())
        assert torch.equal(case.run(native, stored_as), whole.to(dtype))


def test_logits_come_unrounded(native):
    case = make_case(5, 300, 96, around=1).to(torch.bfloat16)
    exact = case.to(torch.float32)
    stored = reference.pack_weight(case.weight, "bfloat16", False, 32)
    wanted = reference.linear(exact.x, stored, exact.norm_weight, EPS, None, None, torch.float32)
    actual = case.run(native, "bfloat16", out_dtype=torch.float32)
    assert actual.dtype == torch.float32
    # Rows may be rounded to bfloat16 before the product, sums are not after it.
    torch.testing.assert_close(actual, wanted, atol=0.02, rtol=0.0)


@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_int4_takes_groups_that_do_not_divide_the_inputs(native, group):
    assert_close(native, make_case(4, 50, 150, group=group), torch.float32, "int4")


def test_fuzzed_shapes(native):
    draw = random.Random(7)
    for _ in range(150):
        gated = draw.random() < 0.5
        out = draw.randint(1, 120) * (2 if gated else 1)
        case = make_case(
            draw.randint(1, 40), out, draw.randint(1, 200), around=draw.randint(0, 7), gated=gated, seed=draw.randint(0, 99)
        )
        dtype = draw.choice(list(FORMATS))
        assert_close(native, case, dtype, draw.choice(FORMATS[dtype]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 63, 64, 100])
def test_rms_norm_is_its_twin(native, dtype, size):
    x, weight = torch.randn(37, size).to(dtype), torch.randn(size).to(dtype)
    plain = reference.rms_norm(x, weight, EPS)
    assert_as_exact_as_torch(native.rms_norm(x, weight, EPS), plain, reference.rms_norm(x.float(), weight.float(), EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_gives_the_rows(native, dtype):
    table, ids = torch.randn(50, 33).to(dtype), torch.tensor([49, 0, 7, 7])
    assert torch.equal(native.embedding(table, ids), reference.embedding(table, ids).float())


@pytest.mark.parametrize("wrong", [-1, 50])
def test_an_id_outside_the_table_is_refused(native, wrong):
    with pytest.raises(IndexError, match=f"id {wrong} is outside the table of 50 rows"):
        native.embedding(torch.zeros(50, 8), torch.tensor([3, wrong]))


def wrong_calls() -> dict[str, tuple[str, dict[str, object]]]:
    """What is wrong: (what the message says, the arguments of linear that differ)."""
    return {
        "inputs": (r"x must be \[rows, 48\]", {"x": torch.zeros(2, 47)}),
        "dtype": ("x must be float32 or bfloat16, not Half", {"x": torch.zeros(2, 48, dtype=torch.float16)}),
        "strides": ("x must be contiguous", {"x": torch.zeros(48, 2).t()}),
        "norm": (r"norm_weight must be \[48\]", {"norm_weight": torch.zeros(47)}),
        "bias": (r"bias must be \[64\]", {"bias": torch.zeros(63)}),
        "residual": (r"residual must be \[2, 64\]", {"residual": torch.zeros(2, 63)}),
        "norm of another dtype": (
            "norm_weight must have the dtype of x",
            {"norm_weight": torch.zeros(48, dtype=torch.bfloat16)},
        ),
        "mixed": (
            "bias must have the dtype of residual",
            {"bias": torch.zeros(64, dtype=torch.bfloat16), "residual": torch.zeros(2, 64)},
        ),
        "wanted": ("out_dtype must be float32 or bfloat16, not Half", {"out_dtype": torch.float16}),
        "unpacked": ("packed must be what `pack` made", {"packed": torch.zeros(999, dtype=torch.uint8)}),
    }


@pytest.mark.parametrize("wrong", wrong_calls())
def test_arguments_that_do_not_fit_are_refused(native, wrong):
    message, differing = wrong_calls()[wrong]
    packed = native.pack(torch.zeros(64, 48), "float32", False, 32)
    arguments = {"x": torch.zeros(2, 48), "packed": packed, "norm_weight": None, "bias": None, "residual": None} | differing
    with pytest.raises(RuntimeError, match=message):
        native.linear(eps=EPS, **{"out_dtype": None} | arguments)
