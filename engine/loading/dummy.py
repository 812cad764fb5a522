"""Random weights of any shape: for benchmarks and tests, where speed matters and sense does not."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_STANDARD_DEVIATION = 0.02


def fill(targets: Mapping[str, Tensor], progress: Callable[[float, str], None], *, seed: int = 0) -> None:
    """Norm weights become 1, everything else normal with a standard deviation of 0.02.

    The same seed, shapes, dtype and device give the same weights.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for done, (name, target) in enumerate(targets.items(), start=1):
        if name.endswith("norm.weight"):
            target.fill_(1.0)
        else:
            if target.device not in generators:
                generators[target.device] = torch.Generator(target.device).manual_seed(seed)
            target.normal_(0.0, _STANDARD_DEVIATION, generator=generators[target.device])
        progress(done / len(targets), "making random weights")
