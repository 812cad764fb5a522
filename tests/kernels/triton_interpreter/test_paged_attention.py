"""Triton's paged attention, interpreted, against the reference: tables, splits, chunks, windows, batch independence."""

import pytest
import torch

from kernels import reference
from kernels.triton.paged_attention import paged_attention
from kernels.triton.tuning import SPLIT_TOKENS
from tests.kernels.paged_case import paged_case
from tests.kernels.tolerance import assert_as_exact_as_torch

DTYPES = [torch.float32, torch.float16]
MIXED = [(1, 1), (63, 1), (100, 1), (64, 1), (100, 37), (5, 5), (130, 2)]


@pytest.fixture(autouse=True)
def _nan_filled(nan_filled_results: None) -> None:
    """Results and partial results start as NaN: an element that a kernel forgets shows."""


def check(chunks: list[tuple[int, int]], *, sliding_window: int = 0, **options: object) -> None:
    case = paged_case(chunks, **options)  # type: ignore[arg-type]
    assert_as_exact_as_torch(
        paged_attention(**case.arguments(), sliding_window=sliding_window),
        reference.paged_attention(**case.arguments(), sliding_window=sliding_window),
        reference.paged_attention(**case.arguments(torch.float32), sliding_window=sliding_window),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 2), (9, 3), (3, 3), (20, 1)])
def test_mixed_batch_of_decodes_and_chunks(heads: tuple[int, int], dtype: torch.dtype) -> None:
    check(MIXED, heads=heads, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [80, 96, 128, 256])
def test_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    check([(70, 1), (100, 9)], head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("block_size", [1, 8, 24, 32, 64, 128])
def test_block_sizes(block_size: int) -> None:
    check([(129, 1), (100, 9)], block_size=block_size)


def test_caches_with_plain_strides() -> None:
    check([(70, 1), (100, 9)], by_head=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contexts_of_several_splits(dtype: torch.dtype) -> None:
    lengths = [SPLIT_TOKENS - 1, SPLIT_TOKENS, SPLIT_TOKENS + 1, 3 * SPLIT_TOKENS + 7, 7]
    check([(length, 1) for length in lengths], heads=(2, 1), dtype=dtype)


def test_more_splits_than_the_merge_reads_at_once() -> None:
    case = paged_case([(17 * SPLIT_TOKENS + 1, 1)], heads=(1, 1), head_dim=16)
    # The last position outweighs each before it, so that what was summed before has to shrink.
    case.k_cache[case.block_tables[0, 17 * SPLIT_TOKENS // 16], 0] = 2 * case.q[0]
    torch.testing.assert_close(
        paged_attention(**case.arguments()), reference.paged_attention(**case.arguments()), atol=1e-5, rtol=1e-5
    )


def test_chunk_after_a_long_context() -> None:
    check([(700, 150), (650, 3)], heads=(2, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 16, 64, 100, 1000])
def test_sliding_window(window: int, dtype: torch.dtype) -> None:
    check([(1, 1), (90, 1), (SPLIT_TOKENS + 33, 1), (300, 140), (40, 40)], heads=(4, 2), dtype=dtype, sliding_window=window)


def test_window_that_begins_and_ends_inside_splits() -> None:
    check([(2 * SPLIT_TOKENS + 100, 1), (2 * SPLIT_TOKENS, 1)], heads=(2, 1), sliding_window=SPLIT_TOKENS + 50)


def test_blocks_before_the_window_are_never_read() -> None:
    case = paged_case([(200, 1), (200, 8)], heads=(2, 1))
    expected = paged_attention(**case.arguments(), sliding_window=20)
    for i, visible in enumerate((180, 173)):
        gone = case.block_tables[i, : visible // 16].long()
        case.k_cache[gone], case.v_cache[gone] = float("nan"), float("nan")
    assert torch.equal(paged_attention(**case.arguments(), sliding_window=20), expected)


@pytest.mark.parametrize("window", [0, 100])
def test_row_is_bitwise_independent_of_batch_mates(window: int) -> None:
    case = paged_case([(40, 1), (2 * SPLIT_TOKENS + 5, 1), (300, 1), (100, 30), (50, 50)], heads=(4, 2), dtype=torch.float16)
    batch = paged_attention(**case.arguments(), sliding_window=window)
    for i in range(5):
        first, last = case.query_start_loc[i].item(), case.query_start_loc[i + 1].item()
        assert torch.equal(paged_attention(**case.only(i), sliding_window=window), batch[first:last])


def test_single_token_chunk_behind_a_long_one_is_computed_too() -> None:
    check([(40, 1), (50, 9), (60, 1)])


def test_scores_of_extreme_size_stay_finite() -> None:
    case = paged_case([(100, 1), (100, 20)])
    arguments = case.arguments() | {"scale": 1000.0}
    actual = paged_attention(**arguments)
    torch.testing.assert_close(actual, reference.paged_attention(**arguments), atol=1e-3, rtol=1e-3)


def test_bfloat16_is_right_in_the_interpreter_too() -> None:
    check([(70, 1), (100, 9)], dtype=torch.bfloat16)


def test_queries_may_be_strided() -> None:
    case = paged_case([(70, 1), (100, 9)], heads=(4, 2))
    wide = torch.cat((case.q, torch.full_like(case.q, float("nan"))), dim=1)
    assert torch.equal(paged_attention(**case.arguments() | {"q": wide[:, :4]}), paged_attention(**case.arguments()))


def test_empty_batch_gives_no_rows() -> None:
    case = paged_case([(70, 1)])
    empty = {"q": case.q[:0], "block_tables": case.block_tables[:0], "seq_lens": case.seq_lens[:0]}
    assert paged_attention(**case.arguments() | empty | {"query_start_loc": case.query_start_loc[:1]}).shape == (0, 4, 64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"scale": 0.0}, "above 0"), ({"q": torch.ones(1, 4, 64, dtype=torch.float64)}, "float64")],
)
def test_what_it_cannot_compute_is_refused(change: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        paged_attention(**paged_case([(70, 1)]).arguments() | change)


def test_head_size_above_256_is_refused() -> None:
    with pytest.raises(ValueError, match="above 256"):
        paged_attention(**paged_case([(3, 1)], head_dim=320).arguments())
