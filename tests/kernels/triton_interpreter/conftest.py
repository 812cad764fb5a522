"""These tests run in Triton's interpreter, in a process of their own: tests/kernels/test_triton_interpreter.py starts it.

Triton reads TRITON_INTERPRET when a kernel is decorated, so a process cannot both interpret and compile.
"""

import os
from typing import Any

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture
def nan_filled_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch gives without values holds NaN, so that no kernel gets by with what happened to lie there."""
    empty = torch.empty

    def filled(*arguments: Any, **options: Any) -> torch.Tensor:
        made = empty(*arguments, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", filled)
    monkeypatch.setattr(torch, "empty_like", lambda x: filled(x.shape, dtype=x.dtype, device=x.device))
