"""Random numbers that depend on (seed, choice, output position) and on nothing else: no state, no order, no batch.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the counter is
(position, choice, domain), the key is the seed. Computed on the host for all rows of a step at once.
"""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_HIGH_SHIFT = np.uint64(32)
_DOMAIN = np.uint64(0x534C5543)
"""Keeps sampling's stream apart from any later use of the same seed."""


def philox(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Ten rounds of Philox4x32. counter: [4, n], key: [2, n], values below 2^32; out: [4, n], likewise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_index in range(_ROUNDS):
        if round_index:
            k0 = (k0 + np.uint64(_WEYL_0)) & _LOW
            k1 = (k1 + np.uint64(_WEYL_1)) & _LOW
        product_0 = _MULTIPLIER_0 * c0
        product_1 = _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (
            (product_1 >> _HIGH_SHIFT) ^ c1 ^ k0,
            product_1 & _LOW,
            (product_0 >> _HIGH_SHIFT) ^ c3 ^ k1,
            product_0 & _LOW,
        )
    return np.stack((c0, c1, c2, c3))


def uniforms(seeds: NDArray[np.int64], choices: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) a row, of 53 random bits. All arrays are [n]; seeds in [0, 2^63)."""
    seed = seeds.astype(np.uint64)
    position = positions.astype(np.uint64)
    counter = np.stack(
        (position & _LOW, position >> _HIGH_SHIFT, choices.astype(np.uint64) & _LOW, np.full_like(seed, _DOMAIN)),
    )
    words = philox(counter, np.stack((seed & _LOW, seed >> _HIGH_SHIFT)))
    bits = (words[0] << np.uint64(21)) | (words[1] >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53
