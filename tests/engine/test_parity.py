"""Greedy token ids equal transformers' own, in float32, for 40 varied prompts (data: make_parity.py)."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request, SamplingParams
from tests.engine.driving import run
from tests.servers.model import model_dir

DATA = Path(__file__).parent / "data" / "parity.json"


def _cases() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return content


def test_the_expected_ids_cover_what_they_should() -> None:
    """40 prompts of six kinds, some above 1,000 tokens, each ending at 64 tokens or at the end-of-sequence token."""
    content = _cases()
    cases = content["cases"]
    assert len(cases) == 40
    assert {case["kind"] for case in cases} == {"chat", "unicode", "code", "raw", "long", "multi-turn"}
    assert sum(len(case["prompt"]) > 1000 for case in cases) >= 4
    for case in cases:
        assert len(case["expected"]) == content["num_tokens"] or case["expected"][-1] == content["eos"]


@pytest.mark.model
@pytest.mark.timeout(600)
def test_greedy_tokens_equal_those_of_transformers() -> None:
    """All 40, batched, chunked and cached as the defaults do it."""
    content = _cases()
    engine = Engine(EngineConfig(model_dir=str(model_dir()), dtype="float32", num_blocks=1024))
    sampling = SamplingParams(max_tokens=content["num_tokens"], seed=0, temperature=0.0)
    requests = [
        Request(request_id=str(i), prompt_token_ids=tuple(case["prompt"]), sampling=sampling)
        for i, case in enumerate(content["cases"])
    ]
    said = run(engine, requests).said
    engine.close()
    assert {i: said[str(i), 0].tokens for i in range(40)} == {i: case["expected"] for i, case in enumerate(content["cases"])}
