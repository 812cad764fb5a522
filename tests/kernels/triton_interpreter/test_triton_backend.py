"""The Triton attention backend, interpreted: layout, plan, and several steps over one cache against the reference."""

from functools import partial

import numpy as np
import torch

from engine.attention.base import AttentionMetadata, KVCacheSpec
from engine.attention.triton_paged import TritonPagedAttention
from engine.execution.captured_steps import _Layout, padded_step, shape_of
from engine.execution.host_batch import ON_DEVICE, HostBatch
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


def test_a_step_padded_for_a_graph_says_what_it_says_without_padding() -> None:
    """Bit for bit, cache and rows, of decodes beside chunks, chunks alone and decodes of which not all sample; ids partly on the device."""
    backend = TritonPagedAttention()
    embedding = torch.randn(50, 8, 64)
    drawn = torch.arange(9) + 10
    tables = torch.arange(1, 37, dtype=torch.int32).view(3, 12)
    for order, chunks, rows in (
        ([0, 1], [(60, 60), (30, 30)], [89]),
        ([1, 0, 2], [(31, 1), (100, 40), (20, 20)], [0, 60]),
        ([0, 1, 2], [(101, 1), (32, 1), (21, 1)], [0, 2]),
    ):
        metadata, positions = step(tables[order], chunks)
        singles = metadata.num_single_token_chunks
        ids = np.arange(len(positions)) % 50
        ids[:singles] = ON_DEVICE
        slots = np.arange(len(positions)) % 9
        caches = [backend.allocate(SPEC, 40, torch.device("cpu"))[0] for _ in range(2)]
        for cache in caches:
            generator = torch.Generator().manual_seed(3)
            for whole in (cache.k, cache.v):
                whole.copy_(torch.randn(whole.shape, generator=generator))

        def compute(cache, ids, positions, metadata, rows):  # type: ignore[no-untyped-def]
            q, k, v = embedding[ids].split([4, 2, 2], dim=1)
            return backend.forward(q, k, v, table(), positions, cache, backend.prepare(metadata), 0.125, 0)[rows]

        host = HostBatch(
            input_ids=ids,
            positions=positions.numpy(),
            slots=slots,
            query_start_loc=metadata.query_start_loc.numpy(),
            seq_lens=metadata.seq_lens.numpy(),
            block_tables=metadata.block_tables.numpy(),
            slot_mapping=metadata.slot_mapping.numpy(),
            rows=np.array(rows),
            num_single_token_chunks=singles,
            max_query_len=metadata.max_query_len,
            max_seq_len=metadata.max_seq_len,
        )
        shape = shape_of(host)
        assert shape is not None
        layout = _Layout(shape=shape, table_width=32)
        buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        layout.numpy(buffer.numpy()).fill(host)
        padded = padded_step(layout, buffer, drawn, partial(compute, caches[0]))
        known = np.where(ids == ON_DEVICE, drawn.numpy()[slots], ids)
        plain = compute(caches[1], torch.from_numpy(known), positions, metadata, torch.tensor(rows))
        assert torch.equal(padded[: len(rows)], plain)
        assert torch.equal(caches[0].k, caches[1].k)
        assert torch.equal(caches[0].v, caches[1].v)
