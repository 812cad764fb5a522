"""The C++ attention computes what kernels/reference.py says, on every instruction set that this processor has, and always the same bits."""

import random
from collections.abc import Iterator

import pytest
import torch

from kernels import reference
from kernels.cpu import attention, choose
from kernels.cpu.build import runnable
from tests.kernels.cpu_attention_case import Case, by_slot
from tests.kernels.tolerance import assert_as_exact_as_torch

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
SIZES = {
    "one first token": [(1, 1)],
    "decodes of odd lengths": [(63, 1), (100, 1), (1, 1), (257, 1), (513, 1), (16, 1)],
    "a whole prompt": [(100, 100)],
    "a prompt over chunk borders": [(513, 300)],
    "decodes beside prompts and chunks": [(33, 1), (5, 1), (257, 1), (63, 63), (100, 37), (600, 5)],
    "an empty chunk": [(33, 1), (40, 0), (17, 17)],
}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What torch allocates holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=runnable())
def every_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    yield choose(request.param).instruction_set
    choose("auto")


@pytest.fixture
def best_isa() -> str:
    return choose("auto").instruction_set


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(case: Case) -> None:
    """Result, and both caches whole: written slots as they must be, the others as they were."""
    exact, exact_keys, exact_values = case.plain(torch.float32)
    plain, plain_keys, plain_values = case.plain(case.q.dtype)
    caches = case.caches()
    assert_as_exact_as_torch(case.run(caches), plain, exact)
    written = ~exact_keys.isnan()
    keys, values = by_slot(caches)
    assert torch.equal(~keys.isnan(), written)
    if case.cache_dtype == torch.int8:  # a rotated key may lie between two bytes
        assert ((keys - exact_keys).abs() <= exact_keys.abs().amax(dim=3, keepdim=True) / 126)[written].all()
        assert torch.equal(values.nan_to_num(7.0), exact_values.nan_to_num(7.0))
    else:
        assert_as_exact_as_torch(keys[written], plain_keys[written], exact_keys[written])
        assert torch.equal(values.nan_to_num(7.0), plain_values.nan_to_num(7.0))


def test_rows_in_float32_are_rounded_where_they_are_written(every_isa):
    """The same numbers, wide: caches bit for bit the same, results the same once they are rounded."""
    case = Case.make([(100, 1), (300, 40), (7, 7)], dtype=torch.bfloat16)
    caches, wide_caches = case.caches(), case.caches()
    narrow = case.run(caches)
    case.q, case.k, case.v = case.q.float(), case.k.float(), case.v.float()
    wide = case.run(wide_caches)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.bfloat16(), narrow)
    for cache, wide_cache in zip(caches, wide_caches, strict=True):
        assert torch.equal(cache.nan_to_num(7.0), wide_cache.nan_to_num(7.0))


@pytest.mark.parametrize("window", [0, 130])
def test_products_over_bytes_are_exact_to_sixteen_bits(every_isa, window):
    """Against float32 over what the caches hold afterwards: nothing but keys and values is rounded to bytes."""
    case = Case.make([(700, 1), (300, 40), (7, 7)], window=window, dtype=torch.int8)
    case.q, case.k, case.v = case.q.float(), case.k.float(), case.v.float()
    caches = case.caches()
    found = case.run(caches)
    exact = case.attended(reference.apply_rotary(case.q, case.cos_sin, case.positions), *by_slot(caches))
    assert found.dtype == torch.float32
    assert ((found - exact).abs() / (1 + exact.abs())).max() < 3e-4


def test_rows_of_nothing_are_kept_as_nothing(every_isa):
    case = Case.make([(40, 3)], dtype=torch.int8)
    case.k[0], case.v[0] = 0.0, 1e-35
    caches = case.caches()
    assert case.run(caches).isfinite().all()
    first = int(case.slot_mapping[0])
    assert all((cache.flatten(0, 1)[first] == 0).all() for cache in by_slot(caches))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 1, 100])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_the_reference(every_isa, sizes, window, dtype):
    check(Case.make(sizes, window=window, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"),
    [
        ((2, 2), 16, 16),
        ((9, 3), 48, 32),
        ((4, 1), 80, 48),
        ((14, 2), 128, 16),
        ((71, 1), 64, 16),
        ((4, 2), 256, 64),
        ((24, 24), 64, 16),
    ],
)
def test_any_heads_and_blocks_will_do(every_isa, heads, head_dim, block_size, dtype):
    check(Case.make([(100, 1), (300, 40), (7, 7)], heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(9, 3), (48, 1), (49, 1), (4, 4)])
def test_single_tokens_of_any_heads(every_isa, threads, heads, dtype):
    """Written by whoever attends them, unless several share a key head."""
    torch.set_num_threads(3)
    check(Case.make(SIZES["decodes of odd lengths"], heads=heads, dtype=dtype))


def test_single_tokens_may_have_slots_in_any_context(every_isa):
    """All are written before any is read."""
    case = Case.make([(100, 1), (40, 1), (33, 1)])
    own = int(case.slot_mapping[2])
    for cache in case.context:
        cache[own // 16, own % 16] = 1.0
    case.slot_mapping[2] = int(case.block_tables[0, 3]) * 16 + 5
    check(case)


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(best_isa, seed):
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 3, 5])
    chunks = []
    for _ in range(draw.randint(1, 9)):
        length = draw.choice([draw.randint(1, 40), draw.randint(1, 700)])
        chunks.append((length, draw.choice([1, 1, draw.randint(0, length)])))
    case = Case.make(
        chunks,
        heads=(kv_heads * draw.choice([1, 2, 3, 4, 7]), kv_heads),
        head_dim=16 * draw.randint(1, 9),
        block_size=16 * draw.randint(1, 5),
        dtype=draw.choice(DTYPES),
        window=draw.choice([0, 0, draw.randint(1, 300)]),
        seed=seed,
    )
    check(case)


def test_no_tokens_at_all(best_isa):
    assert Case.make([]).run().shape == (0, 6, 64)


def test_a_token_with_slot_minus_one_is_not_written(best_isa):
    case = Case.make([(20, 20)])
    left = int(case.slot_mapping[3])
    case.slot_mapping[3] = -1
    caches = case.caches()
    case.run(caches)
    keys, values = (cache.flatten(0, 1) for cache in by_slot(caches))
    assert bool(keys[left].isnan().all() and values[left].isnan().all())
    assert int(keys.isnan().any(dim=(1, 2)).logical_not().sum()) == 19


def test_a_single_token_with_slot_minus_one_is_not_written(best_isa):
    case = Case.make([(20, 1), (30, 1)])
    left = int(case.slot_mapping[0])
    case.slot_mapping[0] = -1
    caches = case.caches()
    case.run(caches)
    keys = by_slot(caches)[0].flatten(0, 1)
    assert bool(keys[left].isnan().all())
    assert int(keys.isnan().any(dim=(1, 2)).logical_not().sum()) == 19 + 30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_poisoned_token_reaches_its_own_sequence_alone(every_isa, part, number, dtype):
    case = Case.make([(40, 1), (300, 8), (17, 1)], dtype=dtype)
    getattr(case, part)[3] = number
    poisoned = (~case.run().isfinite()).any(dim=(1, 2)).tolist()
    assert poisoned[3]
    assert not any(poisoned[:3] if part == "q" else poisoned[:1])
    assert not poisoned[9]


BITWISE = [(700, 1), (30, 1), (257, 1), (520, 130), (100, 63), (1, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 90])
def test_the_number_of_threads_changes_no_bit(every_isa, threads, window, dtype):
    case = Case.make(BITWISE, window=window, dtype=dtype)
    found = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        found.append(case.run())
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 90])
def test_batch_mates_change_no_bit(every_isa, window, dtype):
    case = Case.make(BITWISE, window=window, dtype=dtype)
    together = case.run()
    starts = case.query_start_loc.tolist()
    alone = [case.only(i).run() for i in range(len(BITWISE))]
    assert all(torch.equal(together[starts[i] : starts[i + 1]], alone[i]) for i in range(len(BITWISE)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 90])
@pytest.mark.parametrize("size", [1, 7, 64, 200])
def test_chunks_of_a_prompt_change_no_bit(every_isa, size, window, dtype):
    """Rows of a prompt, and the same rows in chunks down to decodes."""
    case = Case.make([(600, 290)], heads=(9, 3), dtype=dtype, window=window)
    caches = case.caches()
    parts = [case.only(0, range(first, min(first + size, 290))).run(caches) for first in range(0, 290, size)]
    assert torch.equal(torch.cat(parts), case.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_block_size_changes_no_bit(every_isa, dtype):
    small, large = (Case.make([(500, 1), (70, 70)], block_size=size, dtype=dtype) for size in (16, 80))
    assert torch.equal(small.run(), large.run())


WRONG = {
    "position 100 is outside cos_sin": ("positions", lambda x: x + 1),
    "slot 999999 is outside the cache": ("slot_mapping", lambda x: torch.full_like(x, 999_999)),
    "names a block outside the cache": ("block_tables", lambda x: x + 100),
    "needs 7 blocks, its table has 2": ("block_tables", lambda x: x[:, :2].contiguous()),
    "must be .1, 6, 64.": ("q", lambda x: x[:, :, :48]),
    "k must be on the CPU and of Float, as q is": ("k", lambda x: x.bfloat16()),
    "q must be of Float or float32 beside caches of Float, not Half": ("q", lambda x: x.half()),
    "heads must lie side by side": ("v", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "query_start_loc must run from 0": ("query_start_loc", lambda x: x * 2),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_would_read_elsewhere_is_refused(best_isa, message):
    case = Case.make([(100, 1)])
    name, change = WRONG[message]
    case.cos_sin = case.cos_sin[:100]
    caches, work = case.caches(), case.plan()
    setattr(case, name, change(getattr(case, name)))
    with pytest.raises(RuntimeError, match=message):
        case.run(caches, work)


def test_a_plan_of_other_lengths_is_refused(best_isa):
    case, other = Case.make([(100, 1)]), Case.make([(300, 1)])
    with pytest.raises(RuntimeError, match="plan was made for other sequences"):
        case.run(work=other.plan())


def test_a_chunk_longer_than_its_context_is_refused(best_isa):
    with pytest.raises(RuntimeError, match="sequence 0 has a chunk of 5 tokens in a context of 3"):
        attention.plan(torch.tensor([0, 5], dtype=torch.int32), torch.tensor([3], dtype=torch.int32), 4, 2, 0)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((64, 16, torch.float32), ""),
        ((80, 48, torch.bfloat16), ""),
        ((64, 16, torch.float16), "numbers of float16"),
        ((10, 16, torch.float32), "heads of 10 numbers"),
        ((512, 16, torch.float32), "heads of 512 numbers"),
        ((64, 8, torch.float32), "blocks of 8 tokens"),
    ],
)
def test_shapes_that_it_does_not_take_are_named(shape, reason):
    found = attention.refusal(*shape)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_a_cache_that_cannot_be_had_is_an_error(best_isa):
    with pytest.raises(RuntimeError, match="bytes cannot be had"):
        attention.new_cache(1 << 45, 3, 64, 16, torch.bfloat16)
