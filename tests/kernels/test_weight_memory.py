"""Memory of packed weights: many weights share a mapping, none reaches into another, and the mapping goes with the last of them."""

import gc
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.cpu import choose

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
    out: Tensor = torch.ops.sluice_cpu.linear(torch.ones(1, weight.shape[1]), packed, None, 0.0, None, None, False)
    return out


def mapped_bytes() -> int:
    found = re.search(r"^VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


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
    gc.collect()
    before = mapped_bytes()
    weight = torch.zeros(REGION // 4 // 1024, 1024)
    mapped = mapped_bytes()
    packed = pack(weight, "float32", False, 0)  # type: ignore[operator]
    assert mapped_bytes() - mapped >= REGION
    del packed, weight
    gc.collect()
    assert mapped_bytes() - before < REGION
