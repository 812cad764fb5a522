"""The Triton attention backend, interpreted: layout, plan, and several steps over one cache against the reference."""

import torch

from engine.attention.base import AttentionMetadata, KVCacheSpec
from engine.attention.triton_paged import TritonPagedAttention
from kernels import reference

SPEC = KVCacheSpec(num_layers=2, num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.float32)


def table() -> torch.Tensor:
    angles = torch.arange(400).float()[:, None] * 10000.0 ** (-torch.arange(0, 64, 2).float() / 64)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def step(tables: torch.Tensor, chunks: list[tuple[int, int]]) -> tuple[AttentionMetadata, torch.Tensor]:
    """Metadata and positions of chunks (context with the chunk, chunk length)."""
    positions = [torch.arange(length - n, length) for length, n in chunks]
    slots = [tables[i].long()[p // 16] * 16 + p % 16 for i, p in enumerate(positions)]
    metadata = AttentionMetadata(
        query_start_loc=torch.tensor([0, *(n for _, n in chunks)]).cumsum(0).to(torch.int32),
        seq_lens=torch.tensor([length for length, _ in chunks], dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.cat(slots),
        num_single_token_chunks=sum(n == 1 for _, n in chunks),
        max_query_len=max(n for _, n in chunks),
        max_seq_len=max(length for length, _ in chunks),
    )
    return metadata, torch.cat(positions)


def test_cache_has_the_border_shape_and_contiguous_keys_and_values_of_a_head() -> None:
    caches = TritonPagedAttention().allocate(SPEC, 5, torch.device("cpu"))
    assert len(caches) == 2
    for cache in caches:
        for tensor in (cache.k, cache.v):
            assert tensor.shape == (5, 16, 2, 64)
            assert not tensor.any()
            assert tensor[3, :, 1].is_contiguous()
        assert cache.v.data_ptr() - cache.k.data_ptr() == 16 * 64 * 4


def test_steps_over_one_cache_match_the_reference_layer_by_layer() -> None:
    backend = TritonPagedAttention()
    caches = backend.allocate(SPEC, 40, torch.device("cpu"))
    plain = [(torch.zeros(40, 16, 2, 64), torch.zeros(40, 16, 2, 64)) for _ in caches]
    tables = torch.arange(1, 37, dtype=torch.int32).view(3, 12)
    # A prompt in two chunks beside another; then decodes beside a new chunk; then decodes alone.
    for order, chunks in (
        ([0, 1], [(60, 60), (30, 30)]),
        ([1, 0, 2], [(31, 1), (100, 40), (20, 20)]),
        ([0, 1, 2], [(101, 1), (32, 1), (21, 1)]),
    ):
        metadata, positions = step(tables[order], chunks)
        metadata = backend.prepare(metadata)
        for window, cache, (k_cache, v_cache) in zip((0, 24), caches, plain, strict=True):
            q, k, v = torch.randn(len(positions), 8, 64).split([4, 2, 2], dim=1)
            actual = backend.forward(q, k, v, table(), positions, cache, metadata, 0.125, window)
            rotated = reference.rotary_kv_write(q, k, v, table(), positions, k_cache, v_cache, metadata.slot_mapping)
            expected = reference.paged_attention(
                rotated, k_cache, v_cache, metadata.block_tables, metadata.seq_lens, metadata.query_start_loc, 0.125, window
            )
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(cache.k, k_cache, atol=1e-5, rtol=1e-5)
            assert torch.equal(cache.v, v_cache)


def test_work_lists_are_built_once_a_step() -> None:
    metadata, _ = step(torch.arange(1, 25, dtype=torch.int32).view(2, 12), [(70, 1), (30, 30)])
    plan = TritonPagedAttention().prepare(metadata).plan
    assert plan.decode_list(0) is plan.decode_list(0)
    assert plan.prefill_list(16) is plan.prefill_list(16)
    assert plan.prefill_list(16).starts.tolist() == [0, 2]


def test_padding_rows_of_length_zero_get_no_work() -> None:
    metadata, _ = step(torch.arange(1, 25, dtype=torch.int32).view(2, 12), [(70, 1), (1, 1)])
    metadata.seq_lens[1] = 0
    plan = TritonPagedAttention().prepare(metadata).plan
    assert plan.decode_list(0).starts.tolist() == [0, 1, 1]
