"""Steps launched ahead say what steps in turns say: every token, log-probability and reason, whatever ends or is aborted meanwhile."""

from dataclasses import replace

import pytest

from engine import Engine, EngineConfig, Request, SamplingParams
from tests.engine.driving import Listener, step
from tests.engine.tiny_model import VOCAB, write_tiny_model


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return EngineConfig(
        model_dir=str(write_tiny_model(tmp_path_factory.mktemp("model"))),
        dtype="float32",
        num_blocks=40,
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=24,
        overlap="off",
    )


def requests() -> list[Request]:
    """More than the slots and the pool hold: greedy, drawn, filtered, penalised, with log-probabilities, several choices, stop tokens."""
    kinds: list[dict[str, object]] = [
        {},
        {"temperature": 0.9, "logprobs": 2},
        {"temperature": 1.2, "top_k": 9, "top_p": 0.9, "n": 3},
        {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1},
        {"min_tokens": 5, "stop_token_ids": tuple(range(0, VOCAB, 9))},
        {"temperature": 1.0, "stop_token_ids": tuple(range(1, VOCAB, 7))},
        {"logit_bias": {5: 4.0}, "logprobs": 0},
    ]
    return [
        Request(
            request_id=str(i),
            prompt_token_ids=tuple((5 * i + j * j) % VOCAB for j in range(1 + 5 * (i % 7))),
            sampling=SamplingParams(**{"max_tokens": 4 + 3 * i, "seed": i, "temperature": 0.0} | kind),  # type: ignore[arg-type]
        )
        for i, kind in enumerate(kinds * 2)
    ]


def said(
    config: EngineConfig, aborted: dict[int, str] | None = None
) -> dict[tuple[str, int], tuple[list[int], list[float], str | None]]:
    """By choice: tokens, log-probabilities and the reason. `aborted`: whom to abort before a step."""
    engine, listener = Engine(config), Listener()
    waiting = requests()
    number = 0
    while waiting or engine.has_work:
        # One arrives with every second step: prefills stand beside decodes.
        if waiting and number % 2 == 0:
            engine.add(waiting.pop(0))
        if aborted and number in aborted:
            engine.abort(aborted[number])
        step(engine, listener)
        number += 1
    assert engine.stats().num_used_blocks == 0
    engine.close()
    return {key: (one.tokens, [logprob.logprob for logprob in one.logprobs], one.reason) for key, one in listener.said.items()}


@pytest.mark.parametrize("changes", [{}, {"enable_prefix_cache": False}, {"num_blocks": 20}], ids=str)
@pytest.mark.parametrize("cpu_isa", ["auto", "torch"])
def test_what_is_said_is_the_same(config: EngineConfig, cpu_isa: str, changes: dict[str, object]) -> None:
    """With blocks to spare and without: then sequences give way while none is under way."""
    here = replace(config, cpu_isa=cpu_isa, **changes)  # type: ignore[arg-type]
    ahead, in_turns = said(replace(here, overlap="on")), said(here)
    assert {key: (one[0], one[2]) for key, one in ahead.items()} == {key: (one[0], one[2]) for key, one in in_turns.items()}
    for key, (_, logprobs, _) in ahead.items():
        # Plain torch's sums depend in the last bits on what else is in a batch.
        assert logprobs == pytest.approx(in_turns[key][1], abs=1e-4)


def test_an_aborted_request_ends_early_and_no_other_notices(config: EngineConfig) -> None:
    """With operators whose rows do not depend on what else is in a batch: an abort changes it for all others."""
    aborted = {9: "0", 14: "4", 20: "9"}
    own = replace(config, block_size=16, num_blocks=10)
    whole, cut = said(own), said(replace(own, overlap="on"), aborted)
    for (request_id, choice), (tokens, _, reason) in cut.items():
        expected_tokens, _, expected_reason = whole[request_id, choice]
        if reason == "cancelled":
            assert request_id in aborted.values()
            assert tokens == expected_tokens[: len(tokens)]
        else:
            assert (tokens, reason) == (expected_tokens, expected_reason)
    assert sum(reason == "cancelled" for _, _, reason in cut.values()) >= 2


def test_a_request_after_one_that_stopped_unforeseen_says_its_own_tokens(config: EngineConfig) -> None:
    """The step that was launched for the stopped one is dropped, however much later the next request comes."""
    stops = requests()[5]
    later = Request(
        request_id="later", prompt_token_ids=(3, 1, 4), sampling=SamplingParams(max_tokens=6, seed=0, temperature=0.0)
    )
    found = []
    for overlap in ("on", "off"):
        engine, listener = Engine(replace(config, overlap=overlap)), Listener()  # type: ignore[arg-type]
        for request in (stops, later):
            engine.add(request)
            while engine.has_work:
                step(engine, listener)
        assert engine.stats().num_used_blocks == 0
        engine.close()
        found.append(listener.tokens())
    assert found[0] == found[1]
    assert found[0][stops.request_id, 0][1] == "stop"
