"""The flat batch of a step of single tokens, against the sentences that say what it is."""

import pytest
import torch

from kernels.cpu import choose

BLOCK = 16


@pytest.fixture(autouse=True)
def _loaded() -> None:
    if not choose("auto").instruction_set:
        pytest.fail("the C++ operators cannot be built here; install g++", pytrace=False)


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and blocks of 5 slots of 100 tokens, all different."""
    return torch.arange(500).view(5, 100), torch.arange(1000, 1035, dtype=torch.int32).view(5, 7)


@pytest.mark.parametrize(
    "chunks", [[(3, 0, 0)], [(4, 99, 0), (0, 15, 1), (2, 16, 0)], [(1, 31, 1), (3, 32, 1), (0, 47, 0), (4, 48, 0)]]
)
def test_each_row_is_the_slots_token_at_its_position(chunks):
    tokens, blocks = tables()
    made = torch.ops.sluice_cpu.single_tokens(tokens, blocks, torch.tensor(chunks), BLOCK)
    ids, positions, slots, starts, lens, block_tables, mapping = made
    assert ids.tolist() == [-1 if follows else tokens[slot, at].item() for slot, at, follows in chunks]
    assert positions.tolist() == [at for _, at, _ in chunks]
    assert slots.tolist() == [slot for slot, _, _ in chunks]
    assert starts.tolist() == list(range(len(chunks) + 1))
    assert lens.tolist() == [at + 1 for _, at, _ in chunks]
    width = max(at for _, at, _ in chunks) // BLOCK + 1
    assert block_tables.tolist() == [blocks[slot, :width].tolist() for slot, _, _ in chunks]
    assert mapping.tolist() == [blocks[slot, at // BLOCK].item() * BLOCK + at % BLOCK for slot, at, _ in chunks]
    assert [one.dtype for one in made] == [torch.int64] * 3 + [torch.int32] * 3 + [torch.int64]


def test_no_chunks_make_an_empty_batch():
    made = torch.ops.sluice_cpu.single_tokens(*tables(), torch.zeros(0, 3, dtype=torch.int64), BLOCK)
    assert [list(one.shape) for one in made] == [[0], [0], [0], [1], [0], [0, 0], [0]]
    assert made[3].tolist() == [0]


@pytest.mark.parametrize("chunk", [(5, 0, 0), (-1, 0, 0), (0, 100, 0), (0, -1, 0)])
def test_a_place_that_no_slot_has_is_refused(chunk):
    with pytest.raises(RuntimeError, match=f"slot {chunk[0]} has no position {chunk[1]}"):
        torch.ops.sluice_cpu.single_tokens(*tables(), torch.tensor([chunk]), BLOCK)


def test_tables_that_do_not_fit_are_refused():
    tokens, blocks = tables()
    chunks = torch.tensor([(0, 0, 0)])
    for wrong, message in (
        ((tokens.int(), blocks, chunks), "tokens must be a contiguous table of Long"),
        ((tokens, blocks.long(), chunks), "blocks must be a contiguous table of Int"),
        ((tokens, blocks[:4], chunks), r"chunks must be \[n, 3\], tokens and blocks of as many slots"),
        ((tokens, blocks, chunks[:, :2].contiguous()), r"chunks must be \[n, 3\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.sluice_cpu.single_tokens(*wrong, BLOCK)
