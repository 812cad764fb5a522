"""I8: what a request says does not depend on batch mates, chunks, cache hits, preemption or being resumed (float32, real steps)."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request, SamplingParams
from tests.engine.driving import Listener, run
from tests.engine.tiny_model import VOCAB, write_tiny_model

Tokens = dict[tuple[str, int], tuple[list[int], str | None]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def _config(model_dir: Path, **changes: object) -> EngineConfig:
    base = EngineConfig(model_dir=str(model_dir), dtype="float32", num_threads=1, num_blocks=512, max_num_seqs=32)
    return replace(base, **changes)  # type: ignore[arg-type]


def _requests() -> list[Request]:
    """32 of them: greedy and seeded, filters, penalties, bias, minimum lengths, shared prefixes, n up to 3, lengths 1 to 200."""
    rng = random.Random(99)
    shared = tuple(rng.randrange(3, VOCAB) for _ in range(70))
    found = []
    for i in range(32):
        own = tuple(rng.randrange(3, VOCAB) for _ in range(rng.choice([1, 5, 16, 33, 130])))
        sampling = SamplingParams(
            max_tokens=rng.choice([1, 12, 24, 40]),
            seed=rng.getrandbits(63),
            temperature=rng.choice([0.0, 0.0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 20]),
            min_p=rng.choice([0.0, 0.02]),
            presence_penalty=rng.choice([0.0, 0.0, 0.4]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.3]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.1]),
            logit_bias={} if i % 5 else {7: 1.5, 9: -3.0},
            stop_token_ids=tuple(range(60, 76)) if i % 4 == 1 else (),
            ignore_eos=i % 4 == 0,
            n=3 if i % 8 == 3 else 1,
        )
        prompt = shared + own if i % 3 == 0 else own
        found.append(Request(request_id=f"r{i}", prompt_token_ids=prompt, sampling=sampling))
    return found


@pytest.fixture(scope="module")
def alone(model_dir: Path) -> Iterator[Tokens]:
    """The reference: one sequence at a time, whole prompts, no cache."""
    engine = Engine(_config(model_dir, max_num_seqs=1, enable_prefix_cache=False, max_num_batched_tokens=512))
    yield run(engine, _requests()).tokens()
    engine.close()


def _run(config: EngineConfig) -> Listener:
    engine = Engine(config)
    try:
        return run(engine, _requests())
    finally:
        engine.close()


def test_the_reference_says_something_worth_comparing(alone: Tokens) -> None:
    """Both kinds of end, many different tokens."""
    assert {reason for _, reason in alone.values()} == {"stop", "length"}
    assert len({token for tokens, _ in alone.values() for token in tokens}) > 150


@pytest.mark.parametrize("max_num_seqs", [8, 32])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("budget", [16, 64, 512])
def test_batch_chunks_and_cache_do_not_matter(
    model_dir: Path, alone: Tokens, max_num_seqs: int, cache: bool, budget: int
) -> None:
    """Batches of 8 and 32, prefix cache on and off, budgets of 16, 64 and 512 tokens a step."""
    changes = {"max_num_seqs": max_num_seqs, "enable_prefix_cache": cache, "max_num_batched_tokens": budget}
    listener = _run(_config(model_dir, **changes))
    assert listener.tokens() == alone
    assert any(stats.num_prefix_hit_tokens for stats in listener.stats) == cache


@pytest.mark.parametrize("cache", [False, True])
def test_preemption_does_not_matter(model_dir: Path, alone: Tokens, cache: bool) -> None:
    """A pool of 20 blocks forces sequences to give way and start again."""
    listener = _run(_config(model_dir, num_blocks=20, enable_prefix_cache=cache, max_num_batched_tokens=64))
    assert listener.tokens() == alone
    assert sum(stats.num_preemptions for stats in listener.stats) >= 3


def test_one_block_size_says_what_another_says(model_dir: Path, alone: Tokens) -> None:
    """Blocks of 4 and 64 tokens."""
    for block_size, num_blocks in ((4, 2048), (64, 128)):
        assert _run(_config(model_dir, block_size=block_size, num_blocks=num_blocks)).tokens() == alone


@pytest.mark.parametrize("share", [0.0, 0.34, 0.8, 0.99])
def test_a_resumed_request_goes_on_where_it_stopped(model_dir: Path, alone: Tokens, share: float) -> None:
    """Cut at any point and given its said tokens, each choice says the rest; ended choices stay silent."""
    resumed, wanted = [], {}
    for request in _requests():
        whole = [alone[request.request_id, choice] for choice in range(request.sampling.n)]
        said = [tokens[: int(len(tokens) * share)] for tokens, _ in whole]
        ended = (0,) if request.sampling.n > 1 else ()
        for choice in ended:
            said[choice] = whole[choice][0]
        resumed.append(replace(request, output_token_ids=tuple(map(tuple, said)), ended_choices=ended))
        for choice, (tokens, reason) in enumerate(whole):
            if choice not in ended:
                wanted[request.request_id, choice] = (tokens[len(said[choice]) :], reason)
    engine = Engine(_config(model_dir, max_num_batched_tokens=64))
    listener = run(engine, resumed)
    assert listener.tokens() == wanted
    firsts = {(r.request_id, c): len(r.output_token_ids[c]) for r in resumed for c in range(r.sampling.n)}
    assert all(said.first_seq == firsts[key] for key, said in listener.said.items())


def test_choices_differ_and_repeat(model_dir: Path, alone: Tokens) -> None:
    """The choices of one seeded request differ from each other, and a single choice equals the first of three."""
    request = next(r for r in _requests() if r.sampling.n == 3 and r.sampling.temperature > 0)
    said = [tuple(alone[request.request_id, choice][0]) for choice in range(3)]
    assert len(set(said)) == 3
    engine = Engine(_config(model_dir))
    single = run(engine, [replace(request, sampling=replace(request.sampling, n=1))])
    assert tuple(single.said[request.request_id, 0].tokens) == said[0]
