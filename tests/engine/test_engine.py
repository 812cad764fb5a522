"""The engine's face on a tiny real model: refusals, ends, limits, aborts, facts."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import (
    ConfigError,
    EngineFullError,
    InvalidFieldError,
    OutOfMemoryError,
    PromptTooLongError,
    TooManyTokensError,
)
from engine.layers.rotary import RopeConfig, cos_sin_table
from engine.request import Request, SamplingParams
from tests.engine.driving import Listener, run, step
from tests.engine.tiny_model import CONTEXT, EOS, VOCAB, write_tiny_model

GREEDY = SamplingParams(max_tokens=16, seed=0, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def engine(model_dir: Path) -> Iterator[Engine]:
    made = Engine(EngineConfig(model_dir=str(model_dir), num_threads=1, num_blocks=64, max_num_waiting=4))
    yield made
    made.close()


def _ask(name: str = "a", sampling: SamplingParams = GREEDY, prompt: tuple[int, ...] = (5, 6, 7)) -> Request:
    return Request(request_id=name, prompt_token_ids=prompt, sampling=sampling)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (_ask(prompt=(1, VOCAB)), "prompt"),
        (_ask(prompt=(-1,)), "prompt"),
        (_ask(sampling=replace(GREEDY, logit_bias={VOCAB: 1.0})), "sampling.logit_bias"),
        (_ask(sampling=replace(GREEDY, stop_token_ids=(3, VOCAB + 1))), "sampling.stop_token_ids"),
        (replace(_ask(), output_token_ids=((VOCAB,),)), "output_token_ids"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(engine: Engine, request_: Request, field: str) -> None:
    """The error names the field, and nothing is kept."""
    with pytest.raises(InvalidFieldError) as caught:
        engine.add(request_)
    assert caught.value.field == field
    assert not engine.has_work


def test_a_prompt_that_fills_the_context_is_refused(engine: Engine) -> None:
    """No room for one token."""
    with pytest.raises(PromptTooLongError):
        engine.add(_ask(prompt=(5,) * CONTEXT))


def test_what_can_never_fit_is_refused_at_add(engine: Engine) -> None:
    """prompt + max_tokens over the context (I7)."""
    with pytest.raises(TooManyTokensError):
        engine.add(_ask(sampling=replace(GREEDY, max_tokens=CONTEXT)))


def test_a_full_queue_refuses(engine: Engine) -> None:
    """More waiting sequences than `max_num_waiting` raise `overloaded`."""
    for i in range(4):
        engine.add(_ask(f"r{i}"))
    with pytest.raises(EngineFullError):
        engine.add(_ask("one-more"))


def test_max_tokens_ends_with_length(engine: Engine) -> None:
    """Exactly max_tokens, facts with the first and the last output."""
    said = run(engine, [_ask()]).said["a", 0]
    assert (len(said.tokens), said.reason, len(said.facts)) == (16, "length", 2)
    assert said.facts[-1].num_output_tokens == 16
    assert said.facts[-1].first_token_ns <= said.facts[-1].last_token_ns


def test_a_stop_token_ends_and_stands_last(engine: Engine) -> None:
    """A stop id taken from the middle of a known answer ends it there."""
    whole = run(engine, [_ask()]).said["a", 0].tokens
    stop = whole[5]
    said = run(engine, [_ask(sampling=replace(GREEDY, stop_token_ids=(stop,)))]).said["a", 0]
    assert said.tokens == whole[: whole.index(stop) + 1]
    assert said.reason == "stop"


def test_min_tokens_keeps_stop_tokens_away(engine: Engine) -> None:
    """Before the minimum, stop ids and end of sequence are not said at all."""
    whole = run(engine, [_ask()]).said["a", 0].tokens
    params = replace(GREEDY, stop_token_ids=tuple(set(whole)), min_tokens=6, ignore_eos=False)
    said = run(engine, [_ask(sampling=params)]).said["a", 0]
    assert len(said.tokens) >= 6
    assert not {*whole, EOS} & set(said.tokens[:6])


def test_a_biased_end_of_sequence_stops_unless_ignored(engine: Engine) -> None:
    """The model's own end token ends a choice; with ignore_eos it is a token like any other."""
    biased = replace(GREEDY, logit_bias={EOS: 100.0}, ignore_eos=False)
    listener = run(engine, [_ask("stops", biased), _ask("goes-on", replace(biased, ignore_eos=True))])
    assert listener.tokens() == {("stops", 0): ([EOS], "stop"), ("goes-on", 0): ([EOS] * 16, "length")}


def test_logprobs_come_with_every_token(engine: Engine) -> None:
    """One entry a token; greedy's choice is the best of its alternatives."""
    said = run(engine, [_ask(sampling=replace(GREEDY, logprobs=3))]).said["a", 0]
    assert [entry.token_id for entry in said.logprobs] == said.tokens
    for entry in said.logprobs:
        assert entry.top[0][0] == entry.token_id
        assert entry.logprob == pytest.approx(entry.top[0][1], abs=1e-6)
        assert math.exp(entry.logprob) <= 1.0


def test_an_abort_ends_at_the_next_boundary_and_gives_the_blocks_back(engine: Engine) -> None:
    """`cancelled` for each choice; the other request goes on untouched; the pool is whole again."""
    alone = run(engine, [_ask("b", prompt=(9, 9, 4))]).tokens()
    listener = Listener()
    engine.add(_ask("a", replace(GREEDY, n=2, max_tokens=200)))
    engine.add(_ask("b", prompt=(9, 9, 4)))
    for _ in range(3):
        step(engine, listener)
    engine.abort("a")
    engine.abort("unknown")
    while engine.has_work:
        step(engine, listener)
    assert [listener.said["a", choice].reason for choice in (0, 1)] == ["cancelled", "cancelled"]
    assert listener.tokens()["b", 0] == alone["b", 0]
    assert engine.stats().num_used_blocks == 0


def test_steps_report_what_they_did(engine: Engine) -> None:
    """Prefill and decode tokens add up, stamps grow, block counts make the pool."""
    listener = run(engine, [_ask("a", prompt=tuple(range(3, 43))), _ask("b")])
    assert sum(stats.num_prefill_tokens for stats in listener.stats) == 43
    assert sum(stats.num_decode_tokens for stats in listener.stats) == 2 * 15
    for before, after in zip(listener.stats, listener.stats[1:], strict=False):
        assert after.step == before.step + 1
        assert before.started_ns <= before.ended_ns <= after.started_ns
    assert {s.num_free_blocks + s.num_evictable_blocks + s.num_used_blocks for s in listener.stats} == {64}


def test_facts_say_what_was_loaded(engine: Engine) -> None:
    """Sizes of model and pool."""
    facts = engine.facts
    assert (facts.vocab_size, facts.max_model_len, facts.num_blocks) == (VOCAB, CONTEXT, 64)
    assert (facts.device, facts.dtype, facts.kv_cache_dtype, facts.eos_token_ids) == ("cpu", "float32", "float32", (EOS,))
    assert facts.kv_cache_bytes == 64 * 16 * 2 * 2 * 2 * 16 * 4


def test_loading_tells_its_progress(model_dir: Path) -> None:
    """From 0 to 1."""
    told: list[float] = []
    Engine(EngineConfig(model_dir=str(model_dir), num_threads=1), lambda share, what: told.append(share)).close()
    assert told[0] == 0.0
    assert told[-1] == 1.0


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"max_model_len": CONTEXT + 1}, "engine.max_model_len"),
        ({"num_blocks": 1}, "engine.num_blocks"),
        ({"num_blocks": 8, "max_model_len": 256}, "engine.num_blocks"),
        ({"kv_cache_bytes": 1}, "engine.kv_cache_bytes"),
        ({"device": "abacus"}, "engine.device"),
        ({"device": "meta"}, "engine.device"),
        ({"attention_backend": "wishes"}, "engine.attention_backend"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(model_dir: Path, changes: dict[str, object], field: str) -> None:
    """`ConfigError` with the setting in `field`."""
    config = replace(EngineConfig(model_dir=str(model_dir), num_threads=1), **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        Engine(config)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OutOfMemoryError),
        (MemoryError(), OutOfMemoryError),
        (RuntimeError("a library's fault"), RuntimeError),
    ],
    ids=["gpu", "host", "another"],
)
def test_weights_that_do_not_fit_are_a_lack_of_memory(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, seen: type[Exception]
) -> None:
    """The typed error says what to do; any other stays what it is."""

    def load_model(*_: object) -> None:
        raise raised

    monkeypatch.setattr("engine.engine.load_model", load_model)
    with pytest.raises(seen, match="no memory on cpu for the model's weights" if seen is OutOfMemoryError else "a library"):
        Engine(EngineConfig(model_dir=str(model_dir), num_threads=1))


@pytest.mark.parametrize(
    ("changes", "rows"),
    [({"num_blocks": 4}, 64), ({"kv_cache_bytes": 1 << 14}, 32), ({"num_blocks": 4, "max_model_len": 40}, 40), ({}, CONTEXT)],
    ids=["blocks", "bytes", "asked for", "claimed"],
)
def test_the_rotary_table_is_no_longer_than_what_the_pool_can_hold_of_one_sequence(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int], rows: int
) -> None:
    """Whatever context the checkpoint claims; some claim ten million tokens."""
    lengths: list[int] = []

    def recorded(rope: RopeConfig, head_dim: int, max_position: int) -> torch.Tensor:
        lengths.append(max_position)
        return cos_sin_table(rope, head_dim, max_position)

    monkeypatch.setattr("engine.models.llama.cos_sin_table", recorded)
    engine = Engine(replace(EngineConfig(model_dir=str(model_dir), num_threads=1), **changes))  # type: ignore[arg-type]
    assert (lengths[-1], engine.facts.max_model_len) == (rows, rows)
    engine.close()
