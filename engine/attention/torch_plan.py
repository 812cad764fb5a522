"""One step's index tensors of the torch backend: which slots each group of sequences reads, and what it must not see.

Slots are block_id * block_size + offset. Padding repeats a slot of the same sequence that is within its context, and is masked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows are gathered and multiplied in groups of at most this many padded positions: about what a core's cache and spare memory bear.
MAX_GROUP_POSITIONS = 32_768
# A sequence shorter than this share of its group's longest starts a new group, when that saves at least this many positions.
MIN_FILL = 0.5
MIN_SAVED_POSITIONS = 1_024


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Sequences with one query token each.

    `rows`: [num_seqs] int64 of q, None = the first `num_seqs` in order; `slots`: [num_seqs * length] int64; `mask`:
    [num_seqs, 1, 1, length] in q's dtype, 0 where seen and -inf elsewhere, None when nothing is hidden.
    """

    rows: Tensor | None
    slots: Tensor
    mask: Tensor | None
    num_seqs: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Long:
    """One sequence's chunk, rows [first, last) of q.

    `slots`: [length] int64; `mask`: [last - first, length] in q's dtype, 0 or -inf, None for a plain causal triangle over `slots`.
    """

    first: int
    last: int
    slots: Tensor
    mask: Tensor | None


def make_groups(
    block_tables: Tensor, seq_lens: list[int], num_singles: int, block_size: int, window: int, dtype: torch.dtype
) -> list[Group]:
    """Groups of the first `num_singles` sequences, each of similar lengths. `window` above 0 limits what a row reads and sees."""
    spans = [min(length, window) if window else length for length in seq_lens[:num_singles]]
    members = split(spans)
    if len(members) == 1:
        return [_group(block_tables, None, seq_lens[:num_singles], spans, block_size, dtype)]
    return [
        _group(block_tables, rows, [seq_lens[row] for row in rows], [spans[row] for row in rows], block_size, dtype)
        for rows in map(sorted, members)
    ]


def split(spans: list[int]) -> list[list[int]]:
    """Indices of `spans` in groups, longest first: bounded in padded positions, and padded by little where that matters."""
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(spans)), key=lambda i: -spans[i]):
        fits = bool(groups) and longest * (len(groups[-1]) + 1) <= MAX_GROUP_POSITIONS
        wasteful = spans[index] < MIN_FILL * longest and longest - spans[index] >= MIN_SAVED_POSITIONS
        if fits and not wasteful:
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = spans[index]
    return groups


def make_longs(
    block_tables: Tensor,
    starts: list[int],
    seq_lens: list[int],
    num_singles: int,
    block_size: int,
    window: int,
    dtype: torch.dtype,
) -> list[Long]:
    """One entry for each sequence after the first `num_singles`."""
    found = []
    for index in range(num_singles, len(seq_lens)):
        first, last, length = starts[index], starts[index + 1], seq_lens[index]
        if first == last:
            continue
        start = length - (last - first)
        # The chunk's first row sees back to start - window + 1; what lies before is read by none.
        origin = max(0, start - window + 1) if window else 0
        places = torch.arange(origin, length, device=block_tables.device)
        slots = block_tables[index][places // block_size] * block_size + places % block_size
        found.append(Long(first=first, last=last, slots=slots, mask=_chunk_mask(start, length, window, places, dtype)))
    return found


def _chunk_mask(start: int, length: int, window: int, places: Tensor, dtype: torch.dtype) -> Tensor | None:
    if start == 0 and (not window or length <= window):
        return None
    rows = torch.arange(start, length, device=places.device)[:, None]
    hidden = places[None, :] > rows
    if window:
        hidden |= places[None, :] <= rows - window
    return torch.zeros(hidden.shape, dtype=dtype, device=places.device).masked_fill_(hidden, float("-inf"))


def _group(
    block_tables: Tensor, rows: list[int] | None, seq_lens: list[int], spans: list[int], block_size: int, dtype: torch.dtype
) -> Group:
    on, num_seqs, length = block_tables.device, len(spans), max(spans)
    index = None if rows is None else torch.tensor(rows, dtype=torch.int64, device=on)
    span = torch.tensor(spans, dtype=torch.int64, device=on)[:, None]
    origin = torch.tensor(seq_lens, dtype=torch.int64, device=on)[:, None] - span
    columns = torch.arange(length, device=on)[None, :]
    seen = columns < span
    places = origin + torch.where(seen, columns, 0)
    tables = block_tables[:num_seqs] if index is None else block_tables[index]
    slots = tables.gather(1, places // block_size) * block_size + places % block_size
    mask = None
    if min(spans) < length:
        mask = torch.zeros(seen.shape, dtype=dtype, device=on).masked_fill_(~seen, float("-inf"))[:, None, None]
    return Group(rows=index, slots=slots.flatten(), mask=mask, num_seqs=num_seqs, length=length)
