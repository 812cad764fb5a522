"""The stand-in engine: tokens as a pure function, the real engine's manners, paced, faults only when asked."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import (
    CheckpointError,
    ConfigError,
    EngineFullError,
    InvalidFieldError,
    PromptTooLongError,
    TooManyTokensError,
)
from engine.request import Request, SamplingParams
from engine.stand_in import StandInEngine
from engine.stand_in_fault import Fault
from tests.engine.driving import Listener, run, step
from tests.engine.tiny_model import VOCAB, write_tiny_model

CONFIG = EngineConfig(kind="stand-in")
PARAMS = SamplingParams(max_tokens=20, seed=5)


def _ask(name: str = "a", sampling: SamplingParams = PARAMS, prompt: tuple[int, ...] = (100, 200)) -> Request:
    return Request(request_id=name, prompt_token_ids=prompt, sampling=sampling)


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now_ns = 1_000

    def __call__(self) -> int:
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)


def test_tokens_are_a_function_of_prompt_seed_choice_and_position() -> None:
    """Equal alone and among others; different for another seed, prompt or choice."""
    alone = run(StandInEngine(CONFIG), [_ask()]).said["a", 0].tokens
    others = [_ask("b", replace(PARAMS, seed=6)), _ask("c", prompt=(100, 201)), _ask("d", replace(PARAMS, n=2)), _ask()]
    heard = run(StandInEngine(replace(CONFIG, max_num_seqs=2)), others)
    assert heard.said["a", 0].tokens == heard.said["d", 0].tokens == alone
    assert len({tuple(heard.said[key].tokens) for key in (("a", 0), ("b", 0), ("c", 0), ("d", 1))}) == 4


def test_a_resumed_request_says_the_rest() -> None:
    """Said tokens and ended choices are continued as the real engine does."""
    whole = run(StandInEngine(CONFIG), [_ask(sampling=replace(PARAMS, n=3))])
    said = [whole.said["a", choice].tokens for choice in range(3)]
    request = replace(
        _ask(sampling=replace(PARAMS, n=3)),
        output_token_ids=(tuple(said[0][:7]), tuple(said[1]), tuple(said[2][:3])),
        ended_choices=(2,),
    )
    rest = run(StandInEngine(CONFIG), [request])
    assert rest.said["a", 0].tokens == said[0][7:]
    assert (rest.said["a", 1].tokens, rest.said["a", 1].reason) == ([], "length")
    assert ("a", 2) not in rest.said


def test_a_stop_id_ends_it_after_the_minimum() -> None:
    """The stop token stands last; before min_tokens it is not said."""
    whole = run(StandInEngine(CONFIG), [_ask()]).said["a", 0].tokens
    stops = replace(PARAMS, stop_token_ids=(whole[4],))
    assert run(StandInEngine(CONFIG), [_ask(sampling=stops)]).said["a", 0].tokens == whole[:5]
    later = run(StandInEngine(CONFIG), [_ask(sampling=replace(stops, min_tokens=10))]).said["a", 0]
    assert len(later.tokens) == 20
    assert whole[4] not in later.tokens[:10]


def test_an_abort_ends_every_choice() -> None:
    """Running and waiting ones; the pool is whole again."""
    engine = StandInEngine(replace(CONFIG, max_num_seqs=1))
    listener = Listener()
    engine.add(_ask(sampling=replace(PARAMS, n=2)))
    step(engine, listener)
    engine.abort("a")
    step(engine, listener)
    assert [listener.said["a", choice].reason for choice in (0, 1)] == ["cancelled", "cancelled"]
    assert not engine.has_work
    assert engine.stats().num_used_blocks == 0


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (_ask(prompt=(49_152,)), InvalidFieldError),
        (_ask(prompt=(100,) * 8192), PromptTooLongError),
        (_ask(sampling=replace(PARAMS, max_tokens=8192)), TooManyTokensError),
    ],
)
def test_it_refuses_what_the_real_engine_refuses(request_: Request, error: type[Exception]) -> None:
    """The same typed errors, and nothing kept."""
    engine = StandInEngine(CONFIG)
    with pytest.raises(error):
        engine.add(request_)
    assert not engine.has_work


def test_it_is_full_where_others_wait() -> None:
    """One request alone is taken however many choices it has, as by the real engine."""
    engine = StandInEngine(replace(CONFIG, max_num_seqs=1, max_num_waiting=2))
    engine.add(_ask("a", sampling=replace(PARAMS, n=3)))
    with pytest.raises(EngineFullError):
        engine.add(_ask("b", sampling=replace(PARAMS, n=2)))


def test_the_pace_is_tokens_a_second_of_one_sequence() -> None:
    """Two sequences of 20 tokens at 10 a second take 1.9 s of the injected clock, in steps of at most 50 ms."""
    clock = Clock()
    engine = StandInEngine(replace(CONFIG, stand_in_tokens_per_s=10.0), clock=clock, sleep=clock.sleep)
    heard = run(engine, [_ask("a"), _ask("b")])
    assert clock.now_ns - 1_000 == pytest.approx(1.9e9, rel=1e-6)
    assert [len(said.tokens) for said in heard.said.values()] == [20, 20]
    assert max(stats.ended_ns - stats.started_ns for stats in heard.stats) <= 50_000_001


@pytest.mark.parametrize("most", [1, 3, 16, 100])
def test_several_tokens_a_step_are_the_same_tokens(most: int) -> None:
    """In fewer steps, in order, and none past the end."""
    engine = StandInEngine(replace(CONFIG, stand_in_step_tokens=most))
    heard = run(engine, [_ask("a"), _ask("b", prompt=(100,) * 40)])
    alone = run(StandInEngine(CONFIG), [_ask("a"), _ask("b", prompt=(100,) * 40)])
    assert [said.tokens for said in heard.said.values()] == [said.tokens for said in alone.said.values()]
    assert sum(stats.num_decode_tokens for stats in heard.stats) == 40
    assert sum(stats.num_decode_tokens > 0 for stats in heard.stats) == -(-20 // most)


def test_numbers_of_a_step_add_up() -> None:
    """Prefill and decode tokens, and blocks that make the pool."""
    engine = StandInEngine(CONFIG)
    heard = run(engine, [_ask("a", prompt=(100,) * 40), _ask("b")])
    assert sum(stats.num_prefill_tokens for stats in heard.stats) == 42
    assert sum(stats.num_decode_tokens for stats in heard.stats) == 40
    pool = engine.facts.num_blocks
    assert {s.num_free_blocks + s.num_used_blocks for s in heard.stats} == {pool}
    assert heard.stats[0].num_used_blocks == 3 + 1
    assert all(s.num_wasted_slots >= 0 for s in heard.stats)


def test_a_model_directory_gives_its_vocabulary(tmp_path: Path) -> None:
    """So that its tokenizer can read what is said; a directory without config.json is refused."""
    engine = StandInEngine(replace(CONFIG, model_dir=str(write_tiny_model(tmp_path / "tiny"))))
    assert (engine.facts.model, engine.facts.vocab_size, engine.facts.eos_token_ids) == ("tiny", VOCAB, (2,))
    with pytest.raises(CheckpointError):
        StandInEngine(replace(CONFIG, model_dir=str(tmp_path)))


@pytest.mark.parametrize("text", ["explode@1", "exit", "exit@", "exit@-1", "hang@x"])
def test_an_unknown_fault_is_refused(text: str) -> None:
    """The variable's name stands in the error."""
    with pytest.raises(ConfigError) as caught:
        Fault.parse(text)
    assert caught.value.field == "SLUICE_STAND_IN_FAULT"


def test_a_fault_waits_for_its_step() -> None:
    """raise@3 raises in the third step, and in no other."""
    engine = StandInEngine(CONFIG, fault=Fault.parse("raise@3"))
    engine.add(_ask())
    engine.step()
    engine.step()
    with pytest.raises(RuntimeError):
        engine.step()
    assert len(engine.step().every()) == 1
