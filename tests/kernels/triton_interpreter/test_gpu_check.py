"""`make gpu-check`'s own code, as far as a machine without a GPU can run it."""

import math

import pytest
import torch

from kernels.triton.paged_attention import attend
from tests.bench import gpu_check

CPU = torch.device("cpu")


def test_its_correctness_checks_hold_in_the_interpreter() -> None:
    checks = gpu_check.correctness(CPU, long=200, dtypes=(torch.float16,))
    assert [check for check in checks if not check["ok"]] == []
    assert len(checks) == 25


def test_a_wrong_or_missing_value_fails_a_check() -> None:
    right = torch.ones(3)
    assert gpu_check.compare("right", right, right, right)["ok"]
    assert not gpu_check.compare("wrong", right + 1e-3, right, right)["ok"]
    assert not gpu_check.compare("missing", torch.tensor([1.0, math.nan, 1.0]), right, right)["ok"]


@pytest.mark.parametrize("shuffled", [True, False])
def test_its_batches_are_ones_that_the_kernels_take(shuffled: bool) -> None:
    torch.manual_seed(0)
    inputs = gpu_check.batch([(40, 1), (33, 5)], 16, CPU, shuffled)
    inputs["q"], inputs["k_cache"], inputs["v_cache"] = (inputs[name].float() for name in ("q", "k_cache", "v_cache"))
    out = attend(**inputs)
    assert out.shape == (6, gpu_check.HEADS, gpu_check.HEAD_DIM)
    assert torch.isfinite(out).all()


def test_its_counts_are_those_of_causal_attention() -> None:
    seen = sum(position + 1 for position in range(30, 40))
    assert gpu_check.prefill_flops([(40, 10)]) == 4 * 32 * 128 * seen
    assert gpu_check.decode_bytes([(10, 1)]) == 10 * 8 * 128 * 2 * 2 + 2 * 32 * 128 * 2


def test_it_says_so_and_exits_3_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 3
    assert "no GPU" in capsys.readouterr().err
