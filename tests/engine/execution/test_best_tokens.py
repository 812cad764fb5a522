"""Steps in which every row wants the greedy token alone: the model says the tokens, the same ones, and gives no logits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import Engine, EngineConfig, Request, SamplingParams
from kernels import ops
from tests.engine.tiny_model import VOCAB, write_tiny_model

native = pytest.mark.skipif(
    ops.for_device("cpu").greedy_linear is None,
    reason="there is no compiler for the C++ operators; it runs where there is one, as in CI",
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def make(model_dir: Path, **settings: object) -> Engine:
    return Engine(EngineConfig(model_dir=str(model_dir), num_blocks=64, enable_prefix_cache=False, **settings))  # type: ignore[arg-type]


def add(engine: Engine, name: str, length: int, max_tokens: int, **sampling: object) -> None:
    prompt = tuple((7 * len(name) + i * i) % VOCAB for i in range(length))
    params = SamplingParams(**{"max_tokens": max_tokens, "seed": 0, "temperature": 0.0, "ignore_eos": True} | sampling)  # type: ignore[arg-type]
    engine.add(Request(request_id=name, prompt_token_ids=prompt, sampling=params))


def run(engine: Engine, steps: int = 1000) -> dict[str, list[int]]:
    said: dict[str, list[int]] = {}
    while engine.has_work and steps > 0:
        steps -= 1
        for output in engine.step().every():
            said.setdefault(output.request_id, []).extend(output.token_ids)
    return said


class Asked:
    """What the runner asks of the model, where nothing is recorded: (asked for tokens, rows) a call."""

    def __init__(self, engine: Engine) -> None:
        self.calls: list[tuple[bool, int]] = []
        runner = engine._loop._executor
        runner._recorded_steps = None
        model = runner._model
        for name, best in (("best_tokens", True), ("compute_logits", False)):
            setattr(model, name, self._noted(best, getattr(model, name)))

    def _noted(self, best: bool, call):
        def noted(hidden: Tensor) -> Tensor:
            self.calls.append((best, len(hidden)))
            return call(hidden)

        return noted


@native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cpu_isa", ["auto", "scalar"])
@pytest.mark.parametrize("screen_head", [True, False])
def test_tokens_are_those_of_a_batch_that_needs_logits(model_dir, dtype, cpu_isa, screen_head):
    engine = make(model_dir, dtype=dtype, cpu_isa=cpu_isa, screen_head=screen_head)
    lengths = {"a": 3, "bb": 40, "ccc": 17, "dddd": 1, "eeeee": 90}
    for name, length in lengths.items():
        add(engine, name, length, 20 + length)
    plain = run(engine)
    for name, length in lengths.items():
        add(engine, name, length, 20 + length, logprobs=1)
    assert run(engine) == plain
    assert all(len(plain[name]) == 20 + length for name, length in lengths.items())


@native
def test_recorded_steps_change_with_what_their_rows_want(model_dir):
    engine = make(model_dir)
    add(engine, "a", 5, 30)
    alone = run(engine)["a"]
    add(engine, "a", 5, 30)
    said = run(engine, steps=8)["a"]
    add(engine, "late", 9, 6, temperature=0.7)
    assert said + run(engine)["a"] == alone


@native
@pytest.mark.parametrize("wish", [{"logprobs": 2}, {"temperature": 0.5}, {"presence_penalty": 0.5}, {"logit_bias": {3: 1.0}}])
def test_one_row_that_wants_more_has_the_whole_step_give_logits(model_dir, wish):
    engine = make(model_dir)
    asked = Asked(engine)
    add(engine, "a", 4, 8)
    run(engine, steps=3)
    assert asked.calls == [(True, 1)] * 3
    add(engine, "bb", 4, 2, **wish)
    run(engine, steps=2)
    assert asked.calls[3:] == [(False, 2)] * 2
    run(engine)
    assert asked.calls[5:] == [(True, 1)] * 3


@native
def test_a_prompts_last_row_is_said_beside_decodes(model_dir):
    engine = make(model_dir, max_num_batched_tokens=16)
    asked = Asked(engine)
    add(engine, "a", 4, 40)
    run(engine, steps=2)
    add(engine, "bb", 30, 1)
    run(engine, steps=3)
    assert asked.calls == [(True, 1), (True, 1), (True, 1), (True, 2), (True, 1)]


def test_plain_torch_gives_logits(model_dir):
    engine = make(model_dir, cpu_isa="torch")
    asked = Asked(engine)
    add(engine, "a", 4, 2)
    run(engine)
    assert asked.calls == [(False, 1)] * 2


@native
def test_a_row_that_is_not_finite_ends_with_an_error_and_the_others_go_on(model_dir):
    engine = make(model_dir)
    add(engine, "a", 4, 6)
    alone = run(engine)["a"]
    runner = engine._loop._executor
    model, forward = runner._model, runner._model.forward
    runner._recorded_steps = None

    def spoilt(input_ids: Tensor, positions: Tensor, batch: object) -> Tensor:
        hidden = forward(input_ids, positions, batch)
        hidden[-1:] = torch.nan
        return hidden

    add(engine, "a", 4, 6)
    add(engine, "bb", 9, 6)
    model.forward = spoilt
    ends, said = {}, []
    while engine.has_work:
        for output in engine.step().every():
            if output.request_id == "a":
                said.extend(output.token_ids)
            if output.finish_reason:
                ends[output.request_id] = output.finish_reason
        model.forward = forward
    assert (said, ends) == (alone, {"a": "length", "bb": "error"})
