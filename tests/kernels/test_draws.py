"""The counter-based random numbers: right by the published vectors, functions of (seed, choice, position) alone."""

import torch

from kernels.draws import philox, uniforms


def _one(seed: int, choice: int, position: int) -> float:
    return float(uniforms(torch.tensor([seed]), torch.tensor([choice]), torch.tensor([position])))


def test_philox_gives_the_published_vectors() -> None:
    """Known answers of Random123's kat_vectors for philox4x32-10."""
    cases = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    counters = torch.tensor([case[0] for case in cases]).T
    keys = torch.tensor([case[1] for case in cases]).T
    assert philox(counters, keys).T.tolist() == [case[2] for case in cases]


def test_a_row_does_not_depend_on_the_others() -> None:
    """One row computed alone equals the same row among others."""
    seeds, choices, positions = torch.arange(50) * 7919, torch.arange(50) % 4, torch.arange(50).flip(0)
    together = uniforms(seeds, choices, positions)
    assert [_one(int(s), int(c), int(p)) for s, c, p in zip(seeds, choices, positions, strict=True)] == together.tolist()


def test_each_part_of_the_key_matters() -> None:
    """Seed (its high half too), choice and position each give another number."""
    keys = [(1, 0, 0), (2, 0, 0), (1 + (1 << 40), 0, 0), (1, 1, 0), (1, 0, 1), (2**63 - 1, 15, 2**31)]
    assert len({_one(*key) for key in keys}) == len(keys)


def test_numbers_are_uniform() -> None:
    """100,000 numbers over positions: in [0, 1), and 100 equal bins within chi-square's 1e-6 limit for 99 degrees."""
    count = 100_000
    numbers = uniforms(torch.full((count,), 42), torch.zeros(count, dtype=torch.int64), torch.arange(count))
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    bins = torch.histc(numbers, bins=100, min=0.0, max=1.0)
    assert float(((bins - count / 100) ** 2 / (count / 100)).sum()) < 182.0
