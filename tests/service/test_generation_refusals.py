"""What the use case refuses, what it fills in, and what it tells of each request: spans, one line, an id."""

import math
from pathlib import Path

import pytest
import structlog

from engine import SequenceFacts
from service.contract import PromptRequest
from service.errors import RequestError
from service.generation import new_request_id
from service.tokenization import Tokenization
from tests.service.fake_engine import FACTS, facts
from tests.service.generation_bench import (
    Bench,
    a_call,
    failed,
    finished,
    ids,
)
from tests.service.tiny_tokenizer import write_model_dir

REFUSALS = [
    ({"temperature": 3.0}, "invalid_field", "sampling.temperature"),
    ({"top_p": 0.0}, "invalid_field", "sampling.top_p"),
    ({"min_p": math.nan}, "invalid_field", "sampling.min_p"),
    ({"repetition_penalty": 1e-39}, "invalid_field", "sampling.repetition_penalty"),
    ({"n": 17}, "invalid_field", "sampling.n"),
    ({"max_tokens": 0}, "invalid_field", "sampling.max_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "invalid_field", "sampling.min_tokens"),
    ({"seed": -1}, "invalid_field", "sampling.seed"),
    ({"stop": ("",)}, "invalid_field", "sampling.stop[0]"),
    ({"stop": ("x",) * 17}, "invalid_field", "sampling.stop"),
    ({"stop_token_ids": (266,)}, "invalid_field", "sampling.stop_token_ids"),
    ({"logit_bias": {266: 1.0}}, "invalid_field", "sampling.logit_bias"),
    ({"max_tokens": 512}, "too_many_tokens", "sampling.max_tokens"),
    ({"max_tokens": 400, "n": 16}, "too_many_tokens", ""),
]


@pytest.mark.parametrize(("sampling", "code", "field"), REFUSALS)
async def test_sampling_out_of_range_is_refused_by_name(
    bench: Bench, sampling: dict[str, object], code: str, field: str
) -> None:
    with pytest.raises(RequestError) as raised:
        await bench.start(**sampling)
    assert (raised.value.code, raised.value.field) == (code, field)
    assert bench.engine.requests == {}


@pytest.mark.parametrize(
    ("prompt", "code", "field"),
    [
        (PromptRequest(), "invalid_field", "prompt"),
        (PromptRequest(text="a", token_ids=(5,)), "invalid_field", "prompt"),
        (PromptRequest(text=""), "invalid_field", "prompt"),
        (PromptRequest(text="\ud800"), "invalid_field", "prompt"),
        (PromptRequest(text="a" * 2001), "prompt_too_long", "prompt"),
        (PromptRequest(text="a" * 600), "prompt_too_long", "prompt"),
        (PromptRequest(messages=()), "invalid_field", "messages"),
        (PromptRequest(messages=(("user", "a" * 1500), ("user", "a" * 1500))), "prompt_too_long", "messages[1].content"),
        (PromptRequest(token_ids=()), "invalid_field", "token_ids"),
        (PromptRequest(token_ids=(FACTS.vocab_size,)), "invalid_field", "token_ids"),
        (PromptRequest(token_ids=(5,) * 512), "prompt_too_long", "token_ids"),
        (PromptRequest(text="a", model="other"), "unknown_model", "model"),
    ],
)
async def test_a_prompt_that_cannot_be_served_is_refused_by_name(
    bench: Bench, prompt: PromptRequest, code: str, field: str
) -> None:
    with pytest.raises(RequestError) as raised:
        await bench.generation.start(prompt, a_call())
    assert (raised.value.code, raised.value.field) == (code, field)


async def test_a_passed_deadline_is_refused(bench: Bench) -> None:
    with pytest.raises(RequestError) as raised:
        await bench.start(call=a_call(deadline_ns=1))
    assert raised.value.code == "deadline_exceeded"


async def test_absent_fields_come_from_the_model_and_then_from_the_defaults(tmp_path: Path) -> None:
    directory = write_model_dir(tmp_path, generation_config={"temperature": 0.6, "top_k": 20, "max_new_tokens": 33})
    bench = Bench(Tokenization(directory))
    await (await bench.start(top_k=7)).aclose()
    sampling = bench.engine.requests["r"].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 7, 1.0)
    assert (sampling.max_tokens, sampling.seed) == (33, 1234)
    await bench.engine.close()
    await bench.generation.drain(0.0)
    await bench.dispatch


def stamped(started_ns: int) -> SequenceFacts:
    return facts(started_ns + 2_000_000, started_ns + 5_000_000, started_ns + 25_000_000, cached=1)


async def test_spans_have_the_engines_own_times(bench: Bench) -> None:
    stream = await bench.start()
    chat_start = bench.generation._clock()
    bench.engine.say("r", *ids("abcde"), finish="length", facts=stamped(chat_start))
    end = await finished(stream)
    assert end.timings.tpot_ms == pytest.approx(5.0)
    assert end.usage.cached_prompt_tokens == 1
    spans = bench.spans()
    chat = spans["chat tiny"]
    assert {spans[name].parent.span_id for name in ("queue", "prefill", "decode")} == {chat.context.span_id}  # type: ignore[union-attr]
    assert spans["queue"].start_time == chat.start_time
    assert spans["queue"].end_time == spans["prefill"].start_time
    assert spans["prefill"].end_time == spans["decode"].start_time
    assert [spans[name].end_time - spans[name].start_time for name in ("prefill", "decode")] == [3_000_000, 20_000_000]  # type: ignore[operator]
    assert end.trace_id == f"{chat.context.trace_id:032x}"
    assert chat.attributes["gen_ai.usage.output_tokens"] == 5  # type: ignore[index]


@pytest.mark.parametrize("how", ["cancelled", "refused", "deadline_exceeded", "numeric_error"])
async def test_every_way_to_fail_has_a_span_with_an_error(bench: Bench, how: str) -> None:
    if how == "refused":
        how = "invalid_field"
        with pytest.raises(RequestError):
            await bench.start(top_p=9.0)
    else:
        ttl_ms = 10 if how == "deadline_exceeded" else 0
        stream = await bench.generation.start(PromptRequest(text="a", ttl_ms=ttl_ms), a_call())
        if how == "cancelled":
            stream.cancel()
        if how == "numeric_error":
            bench.engine.say("r", finish="error", error=(how, "words"))
        await failed(stream)
    chat = bench.spans()["chat tiny"]
    assert chat.attributes["error.type"] == how  # type: ignore[index]
    assert not chat.status.is_ok
    assert "queue" in bench.spans()


async def test_one_line_a_finished_request_without_its_text(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="service.generation_run")
    with structlog.testing.capture_logs() as lines:
        stream = await bench.start("hello secret")
        bench.engine.say("r", *ids("answer"), finish="length")
        await finished(stream)
    (line,) = [line for line in lines if line["event"] == "request finished"]
    assert (line["request_id"], line["code"], line["completion_tokens"]) == ("r", "ok", len(ids("answer")))
    assert {"queue_ms", "ttft_ms", "tpot_ms", "total_ms"} <= set(line)
    assert "secret" not in str(lines)
    assert "answer" not in str(lines)


def test_request_ids_are_uuid_version_7_and_sort_by_time() -> None:
    first, second = (new_request_id(lambda now=now: now, lambda bits: 2**bits - 1) for now in (10**18, 10**18 + 10**6))
    assert first < second
    assert first == "00e8d4a5-1000-7fff-bfff-ffffffffffff"
