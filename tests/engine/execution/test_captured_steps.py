"""What a captured step is padded to, and how its inputs lie in one buffer. What graphs say is checked by tests/bench/gpu_models.py."""

import numpy as np
import pytest
import torch

from engine.execution.captured_steps import SIZES, Shape, _Layout, bound, known_ids, padded, shape_of
from engine.execution.host_batch import ON_DEVICE, HostBatch


@pytest.mark.parametrize(
    ("num_seqs", "size"), [(0, 0), (1, 1), (3, 4), (17, 24), (64, 64), (65, 96), (256, 256), (257, 512), (513, 768)]
)
def test_a_step_is_padded_to_the_next_size(num_seqs: int, size: int) -> None:
    assert padded(num_seqs) == size


def test_below_the_last_size_at_most_half_a_step_is_padding() -> None:
    assert all(padded(num_seqs) <= 2 * num_seqs for num_seqs in range(1, SIZES[-1] + 1))


@pytest.mark.parametrize(
    ("longest", "length"), [(1, 512), (512, 512), (513, 2048), (2048, 2048), (2049, 8192), (131_072, 131_072)]
)
def test_a_step_has_room_for_the_next_length(longest: int, length: int) -> None:
    assert bound(longest) == length


def batch(decodes: list[int], chunks: list[tuple[int, int]], num_blocks: int, first: int) -> HostBatch:
    """A step of decodes of those lengths and of chunks (length with the chunk, tokens); else numbers that tell the arrays apart. Every
    second decode samples, and the last chunk."""
    counts = [1] * len(decodes) + [tokens for _, tokens in chunks]
    starts = np.cumsum([0, *counts])
    places = np.arange(starts[-1])
    lens = [*decodes, *(length for length, _ in chunks)]
    return HostBatch(
        input_ids=first + places,
        positions=first + 100 + places,
        slots=first + 200 + places,
        query_start_loc=starts.astype(np.int32),
        seq_lens=np.array(lens, np.int32),
        block_tables=np.arange(len(lens) * num_blocks, dtype=np.int32).reshape(-1, num_blocks) + first + 400,
        slot_mapping=first + 500 + places,
        rows=np.array([*range(0, len(decodes), 2), *([starts[-1] - 1] if chunks else [])], np.int64),
        num_single_token_chunks=len(decodes),
        max_query_len=max(counts),
        max_seq_len=max(lens),
    )


@pytest.mark.parametrize(
    ("decodes", "chunks", "shape"),
    [
        ([5] * 3, [], (4, 0, 4, 512)),
        ([], [(40, 40)], (0, 2, 64, 512)),
        ([5] * 3, [(600, 60)], (4, 2, 64, 2048)),
        ([5] * 3, [(600, 61)], (4, 2, 128, 2048)),
        ([5] * 64, [(400, 400)], (64, 2, 512, 512)),
        ([5] * 64, [(450, 449)], (64, 2, 576, 512)),
        ([], [(448, 448)], (0, 2, 512, 512)),  # 448 takes longer
        ([9], [(30, 30), (20, 20), (10, 5)], (1, 16, 64, 512)),
        ([9], [(5000, 1023)], (1, 2, 1024, 8192)),
        ([9], [(5000, 1024)], None),
        ([5] * 256 + [131_072], [(8, 8)], None),
    ],
)
def test_a_step_with_prefill_is_padded_to_whole_tiles(
    decodes: list[int], chunks: list[tuple[int, int]], shape: tuple[int, int, int, int] | None
) -> None:
    expected = shape and Shape(num_decodes=shape[0], num_chunks=shape[1], num_tokens=shape[2], max_seq_len=shape[3])
    assert shape_of(batch(decodes, chunks, 1, 0)) == expected


def test_what_the_host_fills_is_what_the_device_reads_and_what_is_too_much_is_nobodys() -> None:
    """Later, smaller steps: rows of the one before are sequences of no tokens, and tokens that write nothing."""
    layout = _Layout(shape=Shape(num_decodes=4, num_chunks=3, num_tokens=16, max_seq_len=512), table_width=3)
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    host = layout.numpy(buffer.numpy())
    for decodes, chunks, num_blocks, first in (
        ([7, 8, 9, 6], [(30, 5), (20, 4), (3, 3)], 3, 1),
        ([12, 13], [(40, 6)], 1, 7000),
        ([], [(9, 2), (8, 3)], 2, 9000),
        ([5], [], 3, 100),
    ):
        given = batch(decodes, chunks, num_blocks, first)
        host.fill(given)
        input_ids, positions, slots, slot_mapping, rows, query_start_loc, seq_lens, block_tables = layout.torch(buffer)
        own = [*range(len(decodes)), *range(4, 4 + len(given.input_ids) - len(decodes))]
        for found, sent, nothing in (
            (input_ids, given.input_ids, 0),
            (positions, given.positions, 0),
            (slots, given.slots, 0),
            (slot_mapping, given.slot_mapping, -1),
        ):
            assert found[own].tolist() == sent.tolist()
            assert set(found.tolist()) - set(sent.tolist()) <= {nothing}
            assert (found == nothing).sum() == 16 - len(own)
        seqs = [*range(len(decodes)), *range(4, 4 + len(chunks))]
        assert seq_lens[seqs].tolist() == given.seq_lens.tolist()
        assert seq_lens.sum() == given.seq_lens.sum()
        assert block_tables[seqs][:, :num_blocks].tolist() == given.block_tables.tolist()
        ends = list(np.cumsum([tokens for _, tokens in chunks]) + 4)
        assert query_start_loc.tolist() == [0, 1, 2, 3, 4, *ends, *[ends[-1] if ends else 4] * (3 - len(chunks))]
        assert input_ids[rows[: len(given.rows)]].tolist() == given.input_ids[given.rows].tolist()
        types = (input_ids, positions, slots, slot_mapping, rows, query_start_loc, seq_lens, block_tables)
        assert [part.dtype for part in types] == [torch.int64] * 5 + [torch.int32] * 3
        # Kernels are compiled for addresses that 16 divides.
        assert {(part.data_ptr() - buffer.data_ptr()) % 16 for part in types} == {0}


def test_ids_that_are_on_the_device_are_what_was_drawn_in_their_slots() -> None:
    drawn = torch.tensor([50, 60, 70])
    found = known_ids(torch.tensor([5, ON_DEVICE, ON_DEVICE, 0]), torch.tensor([2, 2, 0, 1]), drawn)
    assert found.tolist() == [5, 70, 50, 0]
