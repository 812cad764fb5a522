"""The reference operators against independent torch code, so that what specifies the kernels is itself checked."""

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from kernels import reference
from tests.kernels.paged_case import paged_case


def rotary_table(head_dim: int, num_positions: int = 256) -> torch.Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.arange(num_positions).float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@pytest.mark.parametrize("window", [0, 1, 7, 40])
@pytest.mark.parametrize("chunks", [[(1, 1)], [(63, 1), (100, 33), (16, 16), (17, 1)]])
def test_paged_attention_is_sdpa_over_the_gathered_context(chunks: list[tuple[int, int]], window: int) -> None:
    case = paged_case(chunks, heads=(6, 2))
    actual = reference.paged_attention(**case.arguments(), sliding_window=window)
    expected = []
    for i, (length, num_tokens) in enumerate(chunks):
        distance = torch.arange(length - num_tokens, length)[:, None] - torch.arange(length)[None, :]
        seen = (distance >= 0) & (distance < window if window else True)
        first = case.query_start_loc[i].item()
        out = functional.scaled_dot_product_attention(
            case.q[first : first + num_tokens].transpose(0, 1),
            case.keys[i].transpose(0, 1),
            case.values[i].transpose(0, 1),
            attn_mask=seen,
            enable_gqa=True,
        )
        expected.append(out.transpose(0, 1))
    torch.testing.assert_close(actual, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_paged_attention_skips_a_sequence_without_tokens() -> None:
    case = paged_case([(20, 3), (30, 0), (9, 1)])
    actual = reference.paged_attention(**case.arguments())
    expected = torch.cat([reference.paged_attention(**case.only(0)), reference.paged_attention(**case.only(2))])
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_rotation_is_that_of_transformers(head_dim: int) -> None:
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_theta=10000.0)
    x = torch.randn(5, 4, head_dim)
    positions = torch.tensor([0, 1, 100, 255, 7])
    cos, sin = LlamaRotaryEmbedding(config)(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    actual = reference.apply_rotary(x, rotary_table(head_dim), positions)
    # An angle of 255 radians carries an error of 255 roundings of its frequency.
    torch.testing.assert_close(actual, expected[0].transpose(0, 1), atol=1e-4, rtol=1e-5)


def test_rotary_kv_write_puts_each_token_into_its_slot_and_skips_minus_one() -> None:
    q, k, v = torch.randn(4, 6, 64), torch.randn(4, 2, 64), torch.randn(4, 2, 64)
    k_cache, v_cache = torch.zeros(3, 16, 2, 64), torch.zeros(3, 16, 2, 64)
    positions, slots = torch.tensor([5, 6, 7, 8]), torch.tensor([17, -1, 0, 47])
    table = rotary_table(64)
    rotated = reference.rotary_kv_write(q, k, v, table, positions, k_cache, v_cache, slots)
    expected_k, expected_v = torch.zeros(48, 2, 64), torch.zeros(48, 2, 64)
    for token, slot in ((0, 17), (2, 0), (3, 47)):
        expected_k[slot] = reference.apply_rotary(k, table, positions)[token]
        expected_v[slot] = v[token]
    assert torch.equal(rotated, reference.apply_rotary(q, table, positions))
    assert torch.equal(k_cache.flatten(0, 1), expected_k)
    assert torch.equal(v_cache.flatten(0, 1), expected_v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(100, eps=1e-5).to(dtype)
    norm.weight.data = torch.randn(100).to(dtype)
    x = torch.randn(7, 100).to(dtype)
    torch.testing.assert_close(reference.rms_norm(x, norm.weight.data, 1e-5), norm(x).detach())


def test_add_rms_norm_gives_the_sum_and_its_norm() -> None:
    x, residual, weight = torch.randn(3, 63), torch.randn(3, 63), torch.randn(63)
    normed, total = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, functional.rms_norm(x + residual, (63,), weight, 1e-6))


def test_silu_mul_gates_the_second_half_by_the_first() -> None:
    gate, up = torch.randn(5, 63), torch.randn(5, 63)
    expected = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(reference.silu_mul(torch.cat((gate, up), dim=-1)), expected)


def test_float_product_is_the_product_in_float32() -> None:
    """Exact where the sums are small integers, and float32 whatever comes in."""
    x, weight = torch.tensor([[1.0, 2.0], [-3.0, 4.0]]), torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, -1.0]])
    for dtype in (torch.float32, torch.bfloat16):
        found = reference.float_product(x.to(dtype), weight.to(dtype))
        assert torch.equal(found, torch.tensor([[3.0, 2.0, -2.0], [1.0, -6.0, -4.0]]))
        assert found.dtype == torch.float32
