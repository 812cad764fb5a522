"""From logits to a drawn token, all rows at once, whatever the order of equal values and whoever shares the batch.

Every function treats rows independently. Rows are cut into blocks of `BLOCK` entries, so that one pass of block maxima stands
in for a sort of the vocabulary: the k best blocks hold the k best values. Knows tensors only, no requests.
"""

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 64
_MIN_PREFIX = 128
"""Values looked at first for top-p; most peaked distributions need fewer."""


def pad_to_blocks(rows: Tensor) -> Tensor:
    """[N, V] -> [N, V'] with V' the next multiple of BLOCK; the padding is -inf. Returns the same tensor when V fits."""
    missing = -rows.shape[1] % BLOCK
    return functional.pad(rows, (0, missing), value=float("-inf")) if missing else rows.contiguous()


def row_best(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest value of each row and its first index. rows: [N, V'] padded. NaN in a row makes its value NaN."""
    blocks = rows.view(rows.shape[0], -1, BLOCK)
    maxima = blocks.amax(dim=-1)
    block = maxima.argmax(dim=-1, keepdim=True)
    inner = blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1)
    offset = inner.argmax(dim=-1, keepdim=True)
    return inner.gather(1, offset).squeeze(1), (block * BLOCK + offset).squeeze(1)


def sorted_prefix(rows: Tensor, length: int) -> Tensor:
    """The `length` greatest values of each row, descending: [N, length]. rows: [N, V'] padded."""
    blocks = rows.view(rows.shape[0], -1, BLOCK)
    num_blocks = blocks.shape[1]
    if length * 2 >= num_blocks:
        return rows.topk(min(length, rows.shape[1]), dim=-1).values
    best = blocks.amax(dim=-1).topk(length, dim=-1, sorted=False).indices
    candidates = blocks.gather(1, best.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1)
    return candidates.topk(length, dim=-1).values


def keep_from(scaled: Tensor, weights: Tensor, floor: Tensor, spare: Tensor) -> None:
    """Sets weights below each row's floor [N] to 0, in place. A float mask in kept memory is five times as fast as a bool one."""
    weights.mul_(torch.ge(scaled, floor.unsqueeze(1), out=spare))


def keep_thresholds(scaled: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor, spare: Tensor) -> Tensor:
    """Each row's smallest value that top-k, then top-p over what top-k kept, lets through: [N] float32.

    scaled: [N, V'] float32, greatest value 0; weights: exp(scaled); on the host top_k: [N] int64, 0 = off, and top_p: [N] float64,
    1 = off. A filter keeps every value
    that equals its threshold, so the order of equal values cannot matter. top-p keeps the smallest set of best values whose
    share of the mass reaches top_p (Holtzman et al. 2020). `weights` loses what top-k filters out, in place;
    `spare` is a buffer of the same shape.
    """
    vocab = scaled.shape[1]
    limited = (top_k > 0) & (top_k < vocab)
    longest = int(top_k[limited].max()) if limited.any() else 0
    wants_mass = bool((top_p < 1.0).any())
    length = min(vocab, max(longest, _MIN_PREFIX if wants_mass else 1))
    counts = torch.where(limited, top_k, length).to(scaled.device)
    has_count = limited.to(scaled.device)
    values = sorted_prefix(scaled, length)
    lowest = torch.full_like(values[:, 0], float("-inf"))
    by_count = torch.where(has_count, values.gather(1, counts.unsqueeze(1) - 1).squeeze(1), lowest)
    if not wants_mass:
        return by_count
    shares = top_p.to(scaled.device)
    if longest:
        keep_from(scaled, weights, by_count, spare)
    wanted = shares * block_sums(weights).sum(dim=-1)
    by_mass, reached = _mass_threshold(values, wanted)
    # Where top-k limits the row, what lies beyond the prefix can only be more values equal to its threshold.
    settled = reached | has_count | (shares >= 1.0)
    if not bool(settled.all()):
        rest = (~settled).nonzero().squeeze(1)
        everything = scaled[rest].sort(dim=-1, descending=True).values
        by_mass[rest], reached[rest] = _mass_threshold(everything, wanted[rest])
    by_mass = torch.where(reached & (shares < 1.0), by_mass, lowest)
    return torch.maximum(by_count, by_mass)


def _mass_threshold(values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The value at which the running mass of descending `values` [N, K] first reaches `wanted` [N], and whether it does."""
    enough = values.exp().double().cumsum(dim=-1) >= wanted.unsqueeze(1)
    first = enough.to(torch.uint8).argmax(dim=-1, keepdim=True)
    return values.gather(1, first).squeeze(1), enough[:, -1]


def block_sums(weights: Tensor) -> Tensor:
    """Sums of each block, as float64: [N, V'] float32 -> [N, V' / BLOCK]. Inside a block float32 is as exact as the weights are."""
    return weights.view(weights.shape[0], -1, BLOCK).sum(dim=-1).double()


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first token in id order at which the running sum of `weights` passes uniform x total: [N] int64.

    weights: [N, V'] float32, not negative, 0 = filtered out; uniforms: [N] float64 in [0, 1). Running sums are float64, first
    over blocks, then inside the one that holds the answer. A token of weight 0 is never drawn from a row that has any weight.
    """
    sums = block_sums(weights)
    edges = sums.cumsum(dim=-1)
    total = edges[:, -1]
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total))).unsqueeze(1)
    block = torch.searchsorted(edges, target, right=True).clamp_(max=edges.shape[1] - 1)
    before = torch.where(block > 0, edges.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inner = weights.view(weights.shape[0], -1, BLOCK).gather(1, block.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1)
    passed = (before + inner.double().cumsum(dim=-1) <= target).sum(dim=-1)
    # The two sums may round differently: stay on the block's last token that has weight.
    last = (torch.arange(BLOCK, device=weights.device) * (inner > 0)).amax(dim=-1)
    return block.squeeze(1) * BLOCK + torch.minimum(passed, last)
