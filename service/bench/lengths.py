"""Prompt and output lengths of a load: fixed, ShareGPT-like or power-law, as functions of uniform draws.

Guarantee: the same draws give the same lengths on any machine. The shapes are generated, not read from a data set: what is called
ShareGPT-like is a pair of log-normals with the medians and spreads below. Pure; the draws come from the caller.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

Shape = Literal["fixed", "sharegpt", "powerlaw"]
SHAPES: tuple[Shape, ...] = ("fixed", "sharegpt", "powerlaw")

Draw = Callable[[], float]
"""Uniform in [0, 1)."""

# Log-normal (sigma of the logarithm), scaled so that its mean is the mean asked for: conversations' prompts spread more than answers.
_PROMPT_SIGMA, _OUTPUT_SIGMA = 1.2, 0.9
# Density ~ x^-(alpha + 1): heavy tail, finite mean alpha / (alpha - 1) of the smallest.
_ALPHA = 1.6
_LONGEST = 16
"""No length above this many means, so that one draw is not most of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Means in tokens, before the cut at 16 means, and the shape around them."""

    shape: Shape
    prompt_tokens: int
    output_tokens: int

    def draw(self, uniform: Draw) -> tuple[int, int]:
        """The next request's prompt and output tokens, each at least 1. Takes two draws whatever the shape."""
        first, second = uniform(), uniform()
        return (
            _length(self.shape, self.prompt_tokens, _PROMPT_SIGMA, first),
            _length(self.shape, self.output_tokens, _OUTPUT_SIGMA, second),
        )


def _length(shape: Shape, mean: int, sigma: float, u: float) -> int:
    if shape == "fixed":
        return mean
    if shape == "sharegpt":
        # exp(mu + sigma^2 / 2) is a log-normal's mean.
        value = mean * math.exp(sigma * NormalDist().inv_cdf(min(max(u, 1e-12), 1 - 1e-12)) - sigma * sigma / 2)
    else:
        value = mean * (_ALPHA - 1) / _ALPHA * (1.0 - u) ** (-1.0 / _ALPHA)
    return max(1, min(round(value), _LONGEST * mean))


def exponential(rate: float, uniform: Draw) -> float:
    """Seconds to the next arrival of a Poisson process of `rate` a second."""
    return -math.log(1.0 - uniform()) / rate
