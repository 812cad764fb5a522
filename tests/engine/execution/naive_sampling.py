"""One row at a time, float64, the textbook way: what the vectorised sampler is compared with. Shares no code with it."""

import math
from collections import Counter

import numpy as np

from engine.request import SamplingParams


def adjusted(logits: np.ndarray, params: SamplingParams, prompt: list[int], said: list[int], stops: list[int]) -> np.ndarray:
    """Bias, penalties and minimum length on one row."""
    row = [float(value) for value in logits]
    for token, bias in params.logit_bias.items():
        row[token] += bias
    counts = Counter(said)
    for token in set(prompt) | set(said):
        row[token] = row[token] / params.repetition_penalty if row[token] > 0 else row[token] * params.repetition_penalty
    for token, count in counts.items():
        row[token] -= params.frequency_penalty * count + params.presence_penalty
    if len(said) < params.min_tokens:
        for token in stops:
            row[token] = -math.inf
    return np.array(row)


def filtered(row: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities after temperature, top-k, top-p and min-p; ties at a threshold stay."""
    scaled = (row - row.max()) / params.temperature
    probabilities = np.exp(scaled)
    if 0 < params.top_k < len(row):
        threshold = sorted(scaled)[-params.top_k]
        probabilities = np.where(scaled >= threshold, probabilities, 0.0)
    probabilities = probabilities / probabilities.sum()
    if params.top_p < 1.0:
        mass, threshold = 0.0, 0.0
        for value in sorted(probabilities, reverse=True):
            mass, threshold = mass + value, value
            if mass >= params.top_p:
                break
        probabilities = np.where(probabilities >= threshold, probabilities, 0.0)
    probabilities = np.where(probabilities >= params.min_p * probabilities.max(), probabilities, 0.0)
    return probabilities / probabilities.sum()


def draw(probabilities: np.ndarray, uniform: float) -> int:
    """The first token whose running sum passes the uniform number."""
    total = 0.0
    for token, probability in enumerate(probabilities):
        total += probability
        if total > uniform:
            return token
    return int(np.flatnonzero(probabilities)[-1])
