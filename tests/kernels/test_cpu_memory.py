"""Memory of packed weights: many weights share a mapping, none reaches into another, and the mapping goes with the last of them.

That of caches: taken from the system ahead of use, beside other work, and given back whether or not that is done.
"""

import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.cpu import attention, choose
from kernels.cpu.attention import PAGE_BYTES, CacheMemory

SIZES = ((16, 16), (100, 63), (1, 1), (960, 576), (48, 4096))
REGION = 64 << 20


@pytest.fixture
def pack() -> Iterator[object]:
    choose("auto")
    yield torch.ops.sluice_cpu.pack
    gc.collect()


def weights(pack: object) -> list[tuple[Tensor, Tensor]]:
    """Weights that are one number everywhere, and what they were packed to."""
    made = []
    for value, (outputs, inputs) in enumerate(SIZES, 1):
        weight = torch.full((outputs, inputs), float(value))
        made.append((weight, pack(weight, "float32", False, 0)))  # type: ignore[operator]
    return made


def times_ones(weight: Tensor, packed: Tensor) -> Tensor:
    out: Tensor = torch.ops.sluice_cpu.linear(torch.ones(1, weight.shape[1]), packed, None, 0.0, None, None, None)
    return out


def present_pages(start: int, num_bytes: int) -> list[int]:
    """Pages of 2 MiB from `start` on that the system has given memory, by their first 4 KiB; of an address that is not mapped, none."""
    found = []
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        for page in range(num_bytes // PAGE_BYTES):
            pagemap.seek((start + page * PAGE_BYTES) // 4096 * 8)
            if pagemap.read(8)[7] & 0x80:
                found.append(page)
    return found


def test_weights_lie_at_multiples_of_a_cache_line(pack: object) -> None:
    assert [packed.data_ptr() % 64 for _, packed in weights(pack)] == [0] * len(SIZES)


def test_no_weight_overlaps_another(pack: object) -> None:
    made = weights(pack)
    ends = sorted((packed.data_ptr(), packed.data_ptr() + packed.nbytes) for _, packed in made)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


def test_a_weight_outlives_those_beside_it(pack: object) -> None:
    made = weights(pack)
    kept = made[1]
    del made
    gc.collect()
    later = weights(pack)
    assert torch.equal(times_ones(*kept), torch.full((1, 100), 2.0 * 63))
    assert len(later) == len(SIZES)


def test_a_mapping_is_given_back_with_its_last_weight(pack: object) -> None:
    packed = pack(torch.zeros(REGION // 4 // 1024, 1024), "float32", False, 0)  # type: ignore[operator]
    start = packed.data_ptr()
    assert len(present_pages(start, REGION)) == REGION // PAGE_BYTES
    del packed
    gc.collect()
    # A thread may have mapped some of its own there since.
    assert len(present_pages(start, REGION)) < REGION // PAGE_BYTES // 4


def caches(num: int, num_blocks: int) -> list[Tensor]:
    """Keys of `num` caches, whose memory is their values', too: 4 KiB a block."""
    choose("auto")
    return [attention.new_cache(num_blocks, 1, 32, 16, torch.float32)[0] for _ in range(num)]


def pages_of(made: list[Tensor]) -> list[list[int]]:
    storages = [keys.untyped_storage() for keys in made]
    return [present_pages(storage.data_ptr(), storage.nbytes()) for storage in storages]


def takes_ahead() -> bool:
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor)) >= (5, 14)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(not takes_ahead(), reason="this kernel has no MADV_POPULATE_WRITE; runs on Linux 5.14 and later")
def test_memory_of_caches_is_taken_a_page_ahead_of_what_is_written() -> None:
    made = caches(4, 4096)
    assert {keys.untyped_storage().nbytes() for keys in made} == {8 * PAGE_BYTES}
    assert pages_of(made) == [[]] * 4
    memory = CacheMemory(made)
    wait_for(lambda: pages_of(made) == [[0, 1]] * 4)
    memory.reach(500)  # in the first page, of 512
    time.sleep(0.1)
    assert pages_of(made) == [[0, 1]] * 4
    memory.reach(512)
    wait_for(lambda: pages_of(made) == [[0, 1, 2]] * 4)
    memory.reach(4095)
    wait_for(lambda: pages_of(made) == [[*range(8)]] * 4)
    assert not any(keys.any() for keys in made)


def test_caches_that_go_before_they_are_taken_are_given_back() -> None:
    made = caches(8, 16_384)
    places = [keys.untyped_storage().data_ptr() for keys in made]
    CacheMemory(made).reach(16_383)
    del made
    gc.collect()
    # One may be held while a page of it is taken, and the thread may have mapped some of its own there.
    wait_for(lambda: sum(len(present_pages(place, 32 * PAGE_BYTES)) for place in places) < 8)


def test_other_memory_and_ranges_are_refused() -> None:
    choose("auto")
    take_ahead = torch.ops.sluice_cpu.take_ahead
    with pytest.raises(RuntimeError, match="zeroed_memory"):
        take_ahead([torch.zeros(64)[1:].clone(), torch.zeros(3)], 0, PAGE_BYTES)
    for first, last in ((1, PAGE_BYTES), (-PAGE_BYTES, 0), (PAGE_BYTES, 0)):
        with pytest.raises(RuntimeError, match="range"):
            take_ahead(caches(1, 16), first, last)
