"""What a captured step is padded to, and how its inputs lie in one buffer. What graphs say is checked by tests/bench/gpu_models.py."""

import numpy as np
import pytest
import torch

from engine.execution.captured_steps import SIZES, _Layout, bound, known_ids, padded
from engine.execution.host_batch import ON_DEVICE, HostBatch


@pytest.mark.parametrize(
    ("num_seqs", "size"), [(1, 1), (3, 4), (17, 24), (64, 64), (65, 96), (256, 256), (257, 512), (513, 768)]
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


def batch(num_seqs: int, num_blocks: int, first: int) -> HostBatch:
    """Numbers that tell the arrays apart."""
    places = np.arange(num_seqs)
    return HostBatch(
        input_ids=first + places,
        positions=first + 100 + places,
        slots=first + 200 + places,
        query_start_loc=np.arange(num_seqs + 1, dtype=np.int32),
        seq_lens=(first + 300 + places).astype(np.int32),
        block_tables=np.arange(num_seqs * num_blocks, dtype=np.int32).reshape(num_seqs, num_blocks) + first + 400,
        slot_mapping=first + 500 + places,
        rows=places,
        num_single_token_chunks=num_seqs,
        max_query_len=1,
        max_seq_len=int(first + 300 + num_seqs),
    )


def test_what_the_host_fills_is_what_the_device_reads_and_a_row_too_many_is_nobodys() -> None:
    """A later, smaller step: rows of the one before are sequences of no tokens that write nothing."""
    layout = _Layout(num_seqs=4, table_width=3)
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    host = layout.numpy(buffer.numpy())
    for num_seqs, num_blocks, first in ((4, 3, 1), (2, 1, 7000)):
        given = batch(num_seqs, num_blocks, first)
        host.fill(given)
        input_ids, positions, slots, slot_mapping, seq_lens, block_tables = layout.torch(buffer)
        missing = 4 - num_seqs
        assert input_ids.tolist() == [*given.input_ids, *[0] * missing]
        assert positions.tolist() == [*given.positions, *[0] * missing]
        assert slots.tolist() == [*given.slots, *[0] * missing]
        assert slot_mapping.tolist() == [*given.slot_mapping, *[-1] * missing]
        assert seq_lens.tolist() == [*given.seq_lens, *[0] * missing]
        assert block_tables[:num_seqs, :num_blocks].tolist() == given.block_tables.tolist()
        types = (input_ids, positions, slots, slot_mapping, seq_lens, block_tables)
        assert [part.dtype for part in types] == [torch.int64] * 4 + [torch.int32] * 2


def test_ids_that_are_on_the_device_are_what_was_drawn_in_their_slots() -> None:
    drawn = torch.tensor([50, 60, 70])
    found = known_ids(torch.tensor([5, ON_DEVICE, ON_DEVICE, 0]), torch.tensor([2, 2, 0, 1]), drawn)
    assert found.tolist() == [5, 70, 50, 0]
