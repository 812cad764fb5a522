"""The torch backend computes what kernels/reference.py says, whatever the batch is made of."""

import pytest
import torch

from engine.attention.base import AttentionMetadata, KVCacheSpec, LayerCache
from engine.attention.torch_paged import TorchPagedAttention
from engine.attention.torch_plan import MAX_GROUP_POSITIONS, split
from kernels import reference

CPU = torch.device("cpu")
BLOCK = 16
Q_HEADS, KV_HEADS, DIM = 6, 2, 10


class Case:
    """Random sequences (context length, chunk length) over a cache whose unwritten slots hold NaN."""

    def __init__(self, sizes: list[tuple[int, int]], *, dtype: torch.dtype = torch.float32, block_size: int = BLOCK) -> None:
        torch.manual_seed(len(sizes) * 1000 + sizes[0][0])
        self.backend = TorchPagedAttention()
        num_blocks = sum(-(-length // block_size) for length, _ in sizes) + 1
        spec = KVCacheSpec(num_layers=1, num_kv_heads=KV_HEADS, head_dim=DIM, block_size=block_size, dtype=dtype)
        (self.cache,) = self.backend.allocate(spec, num_blocks, CPU)
        self.cache.k.fill_(float("nan"))
        self.cache.v.fill_(float("nan"))
        order = torch.randperm(num_blocks - 1) + 1
        tables = torch.zeros(len(sizes), max(-(-length // block_size) for length, _ in sizes), dtype=torch.int32)
        slots, positions, taken = [], [], 0
        for row, (length, chunk) in enumerate(sizes):
            count = -(-length // block_size)
            tables[row, :count] = order[taken : taken + count]
            taken += count
            places = torch.arange(length)
            mine = tables[row].long()[places // block_size] * block_size + places % block_size
            before = mine[: length - chunk]
            self.cache.k[before // block_size, before % block_size] = torch.randn(len(before), KV_HEADS, DIM, dtype=dtype)
            self.cache.v[before // block_size, before % block_size] = torch.randn(len(before), KV_HEADS, DIM, dtype=dtype)
            slots.append(mine[length - chunk :])
            positions.append(places[length - chunk :])
        self.positions = torch.cat(positions)
        self.num_tokens = len(self.positions)
        self.q = torch.randn(self.num_tokens, Q_HEADS, DIM, dtype=dtype)
        self.k = torch.randn(self.num_tokens, KV_HEADS, DIM, dtype=dtype)
        self.v = torch.randn(self.num_tokens, KV_HEADS, DIM, dtype=dtype)
        self.cos_sin = torch.randn(max(length for length, _ in sizes), DIM)
        chunks = torch.tensor([chunk for _, chunk in sizes])
        self.metadata = AttentionMetadata(
            query_start_loc=torch.cat((torch.zeros(1, dtype=torch.int64), chunks.cumsum(0))).int(),
            seq_lens=torch.tensor([length for length, _ in sizes], dtype=torch.int32),
            block_tables=tables,
            slot_mapping=torch.cat(slots),
            num_single_token_chunks=sum(chunk == 1 for _, chunk in sizes),
            max_query_len=int(chunks.max()),
            max_seq_len=max(length for length, _ in sizes),
        )

    def run(self, window: int = 0) -> torch.Tensor:
        args = (self.q, self.k, self.v, self.cos_sin, self.positions, self.cache)
        return self.backend.forward(*args, self.backend.prepare(self.metadata), 0.3, window)

    def expected(self, window: int = 0) -> torch.Tensor:
        cache = LayerCache(k=self.cache.k.float(), v=self.cache.v.float())
        q, k, v = self.q.float(), self.k.float(), self.v.float()
        q = reference.rotary_kv_write(q, k, v, self.cos_sin, self.positions, cache.k, cache.v, self.metadata.slot_mapping)
        tables, lens, starts = self.metadata.block_tables, self.metadata.seq_lens, self.metadata.query_start_loc
        return reference.paged_attention(q, cache.k, cache.v, tables, lens, starts, 0.3, window)


SIZES = {
    "one first token": [(1, 1)],
    "one decode": [(63, 1)],
    "decodes of odd lengths": [(100, 1), (1, 1), (63, 1), (16, 1), (17, 1)],
    "a whole prompt": [(63, 63)],
    "a later chunk": [(100, 37)],
    "decodes beside prompts and chunks": [(33, 1), (5, 1), (17, 17), (100, 63), (64, 2)],
    "very unequal decodes": [(3000, 1), (3, 1), (1500, 1), (40, 1)],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("window", [0, 1, 20])
def test_equals_the_reference_in_float32(sizes, window):
    case = Case(sizes)
    expected = case.expected(window)
    torch.testing.assert_close(case.run(window), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stays_near_the_float32_reference_in_half_precision(dtype):
    case = Case(SIZES["decodes beside prompts and chunks"], dtype=dtype)
    expected = case.expected()
    torch.testing.assert_close(case.run().float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("block_size", [1, 3])
def test_any_block_size_will_do(block_size):
    case = Case([(7, 1), (5, 1), (13, 13)], block_size=block_size)
    expected = case.expected()
    torch.testing.assert_close(case.run(), expected, atol=2e-5, rtol=1e-5)


def test_a_row_does_not_depend_on_its_batch_mates():
    case = Case([(3000, 1), (70, 1), (63, 63)])
    together = case.run()
    tables, lens = case.metadata.block_tables, case.metadata.seq_lens
    alone = AttentionMetadata(
        query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
        seq_lens=lens[1:2],
        block_tables=tables[1:2],
        slot_mapping=case.metadata.slot_mapping[1:2],
        num_single_token_chunks=1,
        max_query_len=1,
        max_seq_len=70,
    )
    row = slice(1, 2)
    args = (case.q[row], case.k[row], case.v[row], case.cos_sin, case.positions[row], case.cache)
    apart = case.backend.forward(*args, case.backend.prepare(alone), 0.3, 0)
    torch.testing.assert_close(together[row], apart, atol=1e-6, rtol=1e-5)


def test_keys_and_values_stand_in_their_slots_afterwards():
    case = Case([(20, 1), (9, 9)])
    case.run()
    keys = reference.apply_rotary(case.k, case.cos_sin, case.positions)
    slots = case.metadata.slot_mapping
    torch.testing.assert_close(case.cache.k[slots // BLOCK, slots % BLOCK], keys)
    assert torch.equal(case.cache.v[slots // BLOCK, slots % BLOCK], case.v)


def test_a_token_with_slot_minus_one_is_not_written():
    case = Case([(20, 20)])
    before = case.metadata.slot_mapping.clone()
    case.metadata.slot_mapping[3] = -1
    case.run()
    assert bool(case.cache.k[before[3] // BLOCK, before[3] % BLOCK].isnan().all())
    assert not bool(case.cache.k[before[4] // BLOCK, before[4] % BLOCK].isnan().any())


def test_groups_are_bounded_and_lose_nobody():
    spans = [9000, 8000, 8000, 8000, 4500, 3, 2, 1] * 3
    groups = split(spans)
    assert sorted(index for group in groups for index in group) == list(range(len(spans)))
    assert all(max(spans[i] for i in group) * len(group) <= MAX_GROUP_POSITIONS for group in groups)


def test_short_sequences_of_similar_length_share_a_group():
    assert len(split([200, 190, 60, 1])) == 1
