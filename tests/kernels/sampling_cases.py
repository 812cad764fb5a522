"""Rows of logits that are hard to sample from, and parameters to sample them with."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

KINDS = ("normal", "rounded", "equal", "mostly masked", "bfloat16", "broken")
VOCABULARIES = (1, 2, 63, 64, 65, 100, 255, 256, 257, 1000, 4097, 49_152)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What `sample` takes: logits [N, V] float32, filters [N, 4] float64, draws [N, 3] int64."""

    logits: Tensor
    filters: Tensor
    draws: Tensor

    def row(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """One row alone."""
        return self.logits[i : i + 1].contiguous(), self.filters[i : i + 1], self.draws[i : i + 1]


def make_case(seed: int, kind: str, vocab: int, num_rows: int) -> Case:
    """`broken` rows hold some NaN and +inf; `mostly masked` ones are -inf but for a tenth."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((num_rows, vocab)).astype(np.float32) * np.float32(rng.choice([0.1, 1, 3, 10, 100]))
    if kind == "rounded":
        logits = np.round(logits)
    elif kind == "equal":
        logits[:] = 1.5
    elif kind == "mostly masked":
        logits[rng.random(logits.shape) < 0.9] = -np.inf
    elif kind == "bfloat16":
        logits = torch.from_numpy(logits).bfloat16().float().numpy()
    elif kind == "broken":
        logits[rng.random(logits.shape) < 0.5 / vocab] = np.nan
        logits[rng.random(logits.shape) < 0.3 / vocab] = np.inf
    filters = np.stack(
        (
            rng.choice([0.0, 1e-4, 0.3, 0.8, 1.0, 2.0], num_rows),
            rng.choice([0, 0, 1, 2, 40, 300, 2000, vocab, 2**31 - 1], num_rows),
            rng.choice([1.0, 1.0, 0.95, 0.5, 1e-9, 0.999999], num_rows),
            rng.choice([0.0, 0.0, 0.05, 1.0, 1e-12], num_rows),
        ),
        axis=1,
    )
    draws = np.stack(
        (rng.integers(0, 2**63 - 1, num_rows), rng.integers(0, 16, num_rows), rng.integers(0, 1 << 40, num_rows)), axis=1
    )
    return Case(logits=torch.from_numpy(logits), filters=torch.from_numpy(filters), draws=torch.from_numpy(draws))
