"""Random numbers that depend on (seed, choice, output position) and on nothing else: no state, no order, no batch.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the counter is
(position, choice, domain), the key is the seed. Computed on the host for all rows of a step at once.
"""

import numpy as np
import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
_WORD = 0xFFFFFFFF
_LOW, _HALF = np.uint64(_WORD), np.uint64(32)
_DOMAIN = 0x534C5543
"""Keeps sampling's stream apart from any later use of the same seed."""


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox4x32. counter: [4, n], key: [2, n], int64 values below 2^32; out: [4, n], likewise."""
    words = counter.numpy().astype(np.uint64)
    keys = key.numpy().astype(np.uint64)
    even, odd = words[0::2], words[1::2]
    for round_index in range(_ROUNDS):
        if round_index:
            keys = keys + _WEYL & _LOW
        # Each half of a product goes to the other pair.
        products = even * _MULTIPLIERS
        even, odd = (products >> _HALF)[::-1] ^ odd ^ keys, (products & _LOW)[::-1]
    return torch.from_numpy(np.stack((even[0], odd[0], even[1], odd[1])).astype(np.int64))


def uniforms(seeds: Tensor, choices: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) a row, of 53 random bits: [n] float64. All arguments are [n] int64 on the host; seeds in [0, 2^63)."""
    domain = torch.full_like(seeds, _DOMAIN)
    counter = torch.stack((positions & _WORD, positions >> 32, choices & _WORD, domain))
    words = philox(counter, torch.stack((seeds & _WORD, seeds >> 32)))
    bits = (words[0] << 21) | (words[1] >> 11)
    return bits.double() * 2.0**-53
