"""Logits equal transformers' for every family, whole prompts, chunks and decodes alike."""

import pytest
import torch

from tests.engine.models.families import FAMILIES, save
from tests.engine.models.paged import Sequences, load

LENGTH = 50
ATOL, RTOL = 2e-4, 1e-4


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def pair(request, tmp_path):
    """(our model, token ids, transformers' logits of each of them)."""
    theirs = save(tmp_path, *request.param)
    ids = torch.randint(0, 61, (LENGTH,), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = theirs(ids[None]).logits[0]
    return load(tmp_path, dtype="float32"), ids.tolist(), expected


def test_a_whole_prompt_has_transformers_logits(pair):
    loaded, ids, expected = pair
    torch.testing.assert_close(Sequences(loaded, 1, LENGTH).step({0: ids}), expected, atol=ATOL, rtol=RTOL)


def test_chunks_and_decodes_in_mixed_batches_have_transformers_logits(pair):
    loaded, ids, expected = pair
    sequences = Sequences(loaded, 3, LENGTH)
    first = sequences.step({0: ids[:7], 1: ids[:1], 2: ids[:33]})
    second = sequences.step({0: ids[7:40], 1: ids[1:2], 2: ids[33:34]})
    third = sequences.step({0: ids[40:41], 1: ids[2:30], 2: ids[34:35]})
    torch.testing.assert_close(first, torch.cat((expected[:1], expected[:7], expected[:33])), atol=ATOL, rtol=RTOL)
    torch.testing.assert_close(second, torch.cat((expected[1:2], expected[33:34], expected[7:40])), atol=ATOL, rtol=RTOL)
    torch.testing.assert_close(third, torch.cat((expected[40:41], expected[34:35], expected[2:30])), atol=ATOL, rtol=RTOL)


def test_token_by_token_has_transformers_logits(pair):
    loaded, ids, expected = pair
    sequences = Sequences(loaded, 1, LENGTH)
    rows = torch.cat([sequences.step({0: [token]}) for token in ids])
    torch.testing.assert_close(rows, expected, atol=ATOL, rtol=RTOL)


def test_logits_are_float32_whatever_the_weights(tmp_path):
    save(tmp_path, "Llama", {})
    loaded = load(tmp_path, dtype="bfloat16")
    assert loaded.plan.dtype == torch.bfloat16
    assert Sequences(loaded, 1, 8).step({0: [3, 4, 5]}).dtype == torch.float32


def test_bfloat16_stays_near_float32(tmp_path):
    save(tmp_path, "Llama", {"initializer_range": 0.05})
    ids = list(range(40))
    exact = Sequences(load(tmp_path, dtype="float32"), 1, 40).step({0: ids})
    rough = Sequences(load(tmp_path, dtype="bfloat16"), 1, 40).step({0: ids})
    assert (rough - exact).norm() / exact.norm() < 0.05
