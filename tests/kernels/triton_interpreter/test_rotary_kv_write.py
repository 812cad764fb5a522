"""Triton's rotation and KV write, interpreted, against the reference."""

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.triton.rotary_kv_write import rotary_kv_write
from tests.kernels.tolerance import assert_as_exact_as_torch


@pytest.fixture(autouse=True)
def _nan_filled(nan_filled_results: None) -> None:
    """Results start as NaN: an element that the kernel forgets shows."""


def rotary_table(head_dim: int) -> Tensor:
    angles = torch.arange(300).float()[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def caches(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, by_head: bool) -> Tensor:
    """[2, num_blocks, block_size, Hkv, D] of NaN, plain or with the backend's strides."""
    if by_head:
        return torch.full((num_blocks, num_kv_heads, 2, block_size, head_dim), float("nan"), dtype=dtype).permute(2, 0, 3, 1, 4)
    return torch.full((2, num_blocks, block_size, num_kv_heads, head_dim), float("nan"), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("num_tokens", "heads", "head_dim", "block_size", "by_head"),
    [
        (1, (4, 2), 64, 16, True),
        (63, (9, 3), 64, 16, True),
        (7, (3, 3), 80, 32, False),
        (2, (17, 1), 96, 16, True),
        (1, (2, 1), 256, 64, True),
    ],
)
def test_rotation_and_write(
    num_tokens: int, heads: tuple[int, int], head_dim: int, block_size: int, by_head: bool, dtype: torch.dtype
) -> None:
    num_blocks = -(-num_tokens // block_size) + 2
    table = rotary_table(head_dim)
    # Views of one product, as a QKV linear gives them.
    qkv = torch.randn(num_tokens, heads[0] + 2 * heads[1], head_dim).to(dtype)
    q, k, v = qkv.split([heads[0], heads[1], heads[1]], dim=1)
    positions = torch.randint(0, 300, (num_tokens,))
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    slots[num_tokens // 2] = -1
    found = caches(num_blocks, block_size, heads[1], head_dim, dtype, by_head)
    plain, exact = torch.full_like(found, float("nan")), torch.full_like(found, float("nan"), dtype=torch.float32)
    actual = rotary_kv_write(q, k, v, table, positions, *found, slots)
    plain_q = reference.rotary_kv_write(q, k, v, table, positions, *plain, slots)
    exact_q = reference.rotary_kv_write(q.float(), k.float(), v.float(), table, positions, *exact, slots)
    assert_as_exact_as_torch(actual, plain_q, exact_q)
    assert torch.equal(found.isnan(), plain.isnan()), "other slots were written, or too few"
    assert torch.equal(found[1].nan_to_num(), plain[1].nan_to_num())
    assert_as_exact_as_torch(found[0].nan_to_num(), plain[0].nan_to_num(), exact[0].nan_to_num())


def test_elements_that_are_apart_are_refused() -> None:
    q = torch.randn(1, 64, 4).transpose(1, 2)
    k_cache, v_cache = caches(1, 16, 4, 64, torch.float32, True)
    with pytest.raises(ValueError, match="contiguous"):
        rotary_kv_write(q, q, q, rotary_table(64), torch.tensor([0]), k_cache, v_cache, torch.tensor([0]))


def test_caches_of_different_strides_are_refused() -> None:
    q = torch.randn(1, 4, 64)
    k_cache, v_cache = caches(2, 16, 4, 64, torch.float32, True)[0], caches(2, 16, 4, 64, torch.float32, False)[1]
    with pytest.raises(ValueError, match="equal strides"):
        rotary_kv_write(q, q, q, rotary_table(64), torch.tensor([0]), k_cache, v_cache, torch.tensor([0]))
