"""Random numbers that depend on (seed, choice, output position) and on nothing else: no state, no order, no batch.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the counter is
(position, choice, domain), the key is the seed. Computed on the host for all rows of a step at once.
"""

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_LOW = 0xFFFFFFFF
_DOMAIN = 0x534C5543
"""Keeps sampling's stream apart from any later use of the same seed."""


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox4x32. counter: [4, n], key: [2, n], int64 values below 2^32; out: [4, n], likewise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_index in range(_ROUNDS):
        if round_index:
            k0 = (k0 + _WEYL_0) & _LOW
            k1 = (k1 + _WEYL_1) & _LOW
        # 64 bits of a product of two 32-bit numbers: int64 wraps to the right bits, and the mask takes the sign out of the high ones.
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> 32 & _LOW) ^ c1 ^ k0,
            product_1 & _LOW,
            (product_0 >> 32 & _LOW) ^ c3 ^ k1,
            product_0 & _LOW,
        )
    return torch.stack((c0, c1, c2, c3))


def uniforms(seeds: Tensor, choices: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) a row, of 53 random bits: [n] float64. All arguments are [n] int64 on the host; seeds in [0, 2^63)."""
    domain = torch.full_like(seeds, _DOMAIN)
    counter = torch.stack((positions & _LOW, positions >> 32, choices & _LOW, domain))
    words = philox(counter, torch.stack((seeds & _LOW, seeds >> 32)))
    bits = (words[0] << 21) | (words[1] >> 11)
    return bits.double() * 2.0**-53
