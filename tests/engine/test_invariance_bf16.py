"""I8 on the real model in its own bfloat16, bit for bit: the C++ operators sum each row in one order, whatever is computed beside it."""

import random
from dataclasses import replace

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.output import TokenLogprobs
from engine.request import Request, SamplingParams
from tests.engine.driving import run
from tests.servers.model import model_dir

pytestmark = pytest.mark.model

Said = dict[tuple[str, int], tuple[list[int], list[TokenLogprobs]]]
"""Tokens, and log-probabilities of the best of them, which would betray a single changed bit."""


@pytest.fixture(scope="module")
def config() -> EngineConfig:
    return EngineConfig(
        model_dir=str(model_dir()), dtype="bfloat16", num_blocks=128, enable_prefix_cache=False, max_num_batched_tokens=512
    )


def requests() -> list[Request]:
    """Prompts of 1 to 150 tokens, greedy and drawn."""
    rng = random.Random(5)
    return [
        Request(
            request_id=f"r{i}",
            prompt_token_ids=tuple(rng.randrange(1000, 40000) for _ in range(length)),
            sampling=SamplingParams(max_tokens=8, seed=i, temperature=0.8 * (i % 2), ignore_eos=True, logprobs=3),
        )
        for i, length in enumerate((1, 17, 150, 40, 63, 2, 33))
    ]


def said(config: EngineConfig) -> Said:
    engine = Engine(config)
    try:
        listener = run(engine, requests())
    finally:
        engine.close()
    return {key: (choice.tokens, choice.logprobs) for key, choice in listener.said.items()}


@pytest.fixture(scope="module")
def alone(config: EngineConfig) -> Said:
    """One sequence at a time, whole prompts."""
    return said(replace(config, max_num_seqs=1))


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_num_batched_tokens": 24}, {"num_threads": 1}, {"max_num_batched_tokens": 64, "enable_prefix_cache": True}],
    ids=str,
)
def test_what_is_said_does_not_depend_on_batch_chunks_threads_or_cache(config, alone, changes):
    assert said(replace(config, **changes)) == alone


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_what_quantised_weights_say_does_not_depend_on_batch_or_chunks(config, quantize):
    quantised = replace(config, quantize=quantize)
    assert said(replace(quantised, max_num_batched_tokens=24)) == said(replace(quantised, max_num_seqs=1))


@pytest.mark.parametrize(
    "changes", [{}, {"max_num_batched_tokens": 24, "num_threads": 1}, {"enable_prefix_cache": True, "overlap": "off"}], ids=str
)
def test_what_is_said_over_a_cache_of_bytes_does_not_depend_on_batch_or_chunks(config, alone, changes):
    in_bytes = replace(config, kv_cache_dtype="int8")
    one_by_one = said(replace(in_bytes, max_num_seqs=1))
    assert said(replace(in_bytes, **changes)) == one_by_one
    assert one_by_one != alone


def test_the_reference_has_many_tokens_and_a_logprob_for_each(alone):
    assert {len(logprobs) for _, logprobs in alone.values()} == {8}
    assert len({token for tokens, _ in alone.values() for token in tokens}) > 20
