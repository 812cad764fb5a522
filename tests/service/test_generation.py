"""The one use case over a fake engine: what is refused, what is said, and how everything ends."""

import asyncio
import gc
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan

from engine import SequenceFacts, TokenLogprobs
from service.admission import Admission
from service.config import AdmissionSection, TracingSection
from service.contract import Call, Delta, Event, Failed, Finished, PromptRequest, SamplingFields, Started
from service.errors import RequestError
from service.generation import Generation, GenerationStream, new_request_id
from service.resolution import Limits
from service.streams import Streams
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import Tracing
from service.tokenization import Tokenization
from tests.service.fake_engine import FACTS, FakeEngine, facts
from tests.service.tiny_tokenizer import tiny_tokenizer, write_model_dir

TOKENIZER = tiny_tokenizer()


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text).ids)


class Bench:
    """A `Generation` and everything around it."""

    def __init__(self, tokenization: Tokenization) -> None:
        self.engine = FakeEngine()
        self.streams = Streams()
        self.metrics = Metrics()
        self.tracing = Tracing(TracingSection(), memory=True)
        self.admission = Admission(AdmissionSection(max_requests=4, max_tokens=1000))
        self.generation = Generation(
            engine=self.engine,
            streams=self.streams,
            tokenization=tokenization,
            admission=self.admission,
            limits=Limits(model="tiny", max_tokens_cap=50, max_prompt_bytes=2000),
            tracing=self.tracing,
            metrics=self.metrics.requests,
            draw_seed=lambda: 1234,
        )
        self.dispatch = asyncio.create_task(self.streams.run(self.engine.outputs()))

    async def start(self, text: str = "hello", *, call: Call | None = None, **sampling: object) -> GenerationStream:
        prompt = PromptRequest(text=text, sampling=SamplingFields(**sampling))  # type: ignore[arg-type]
        return await self.generation.start(prompt, call or a_call())

    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.tracing.spans()}


def a_call(request_id: str = "r", **changes: object) -> Call:
    return replace(Call(request_id=request_id, transport="grpc", parent=Context()), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenization(tmp_path_factory: pytest.TempPathFactory) -> Tokenization:
    return Tokenization(write_model_dir(tmp_path_factory.mktemp("model")))


@pytest.fixture
async def bench(tokenization: Tokenization) -> AsyncIterator[Bench]:
    bench = Bench(tokenization)
    yield bench
    await bench.engine.close()
    await bench.dispatch
    await bench.generation.drain(0.0)
    assert (bench.admission.num_requests, len(bench.streams)) == (0, 0), "everything was given back"


async def collect(stream: GenerationStream) -> list[Event]:
    async with asyncio.timeout(10):
        events = [event async for event in stream]
    assert isinstance(events[0], Started)
    assert [isinstance(event, Finished | Failed) for event in events].count(True) == 1
    assert isinstance(events[-1], Finished | Failed)
    return events


async def finished(stream: GenerationStream) -> Finished:
    end = (await collect(stream))[-1]
    assert isinstance(end, Finished)
    return end


async def failed(stream: GenerationStream) -> Failed:
    end = (await collect(stream))[-1]
    assert isinstance(end, Failed)
    return end


async def until_text(stream: GenerationStream, text: str) -> None:
    seen = ""
    async with asyncio.timeout(10):
        async for event in stream:
            seen += event.text if isinstance(event, Delta) else ""
            if seen == text:
                return
    raise AssertionError(f"the stream ended with {seen!r}")


async def test_deltas_joined_are_the_result(bench: Bench) -> None:
    stream = await bench.start(max_tokens=10)
    for token_id in ids("hello wörld"):
        bench.engine.say("r", token_id)
    bench.engine.say("r", 2, finish="stop", stop_token_id=2)
    events = await collect(stream)
    deltas = [event for event in events if isinstance(event, Delta)]
    end = events[-1]
    assert isinstance(end, Finished)
    (choice,) = end.choices
    assert (choice.text, choice.finish_reason) == ("hello wörld", "stop")
    assert "".join(delta.text for delta in deltas) == choice.text
    assert sum((delta.token_ids for delta in deltas), ()) == choice.token_ids == (*ids("hello wörld"), 2)
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (1, len(choice.token_ids))


async def test_deltas_number_tokens_and_characters(bench: Bench) -> None:
    stream = await bench.start()
    seen: list[Delta] = []
    for token_id in ids("a€b"):
        bench.engine.say("r", token_id)
        await until_delta(stream, seen)
    assert [(delta.seq, delta.text_offset, delta.text) for delta in seen] == [
        (0, 0, "a"),
        (1, 1, ""),
        (2, 1, ""),
        (3, 1, "€"),
        (4, 2, "b"),
    ]
    await stream.aclose()


async def until_delta(stream: GenerationStream, seen: list[Delta]) -> None:
    async for event in stream:
        if isinstance(event, Delta):
            seen.append(event)
            return


async def test_a_slow_reader_gets_merged_deltas_and_loses_nothing(bench: Bench) -> None:
    stream = await bench.start(n=2)
    for _ in range(20):
        bench.engine.say("r", *ids("x"), choice=0)
        bench.engine.say("r", *ids("y"), choice=1)
    bench.engine.say("r", choice=0, finish="length")
    bench.engine.say("r", choice=1, finish="length")
    await wait_until(lambda: bench.generation.num_running == 0)
    events = await collect(stream)
    assert [event.text for event in events if isinstance(event, Delta)] == ["x" * 20, "y" * 20]


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the state that is waited for has no event, and tests add none to it
            await asyncio.sleep(0)


async def test_a_stop_string_over_token_boundaries_ends_the_text_before_it(bench: Bench) -> None:
    stream = await bench.start(stop=("END",))
    for token_id in ids("abEN"):
        bench.engine.say("r", token_id)
    bench.engine.say("r", *ids("Dxyz"))
    end = await finished(stream)
    (choice,) = end.choices
    assert (choice.text, choice.finish_reason) == ("ab", "stop")
    assert choice.token_ids == ids("abEND")
    assert end.usage.completion_tokens == len(ids("abEND"))
    await wait_until(lambda: bench.engine.aborted == ["r"])


async def test_a_stop_string_on_one_choice_leaves_the_others_alone(bench: Bench) -> None:
    stream = await bench.start(n=2, stop=("S",))
    bench.engine.say("r", *ids("aS"), choice=0)
    bench.engine.say("r", *ids("bb"), choice=1)
    bench.engine.say("r", *ids("more"), choice=0)
    bench.engine.say("r", *ids("c"), choice=1)
    assert bench.engine.aborted == []
    bench.engine.say("r", choice=1, finish="length")
    end = await finished(stream)
    assert [(choice.text, choice.finish_reason) for choice in end.choices] == [("a", "stop"), ("bbc", "length")]
    assert end.usage.completion_tokens == 5


async def test_min_tokens_puts_off_stop_strings(bench: Bench) -> None:
    stream = await bench.start(stop=("S",), min_tokens=3)
    for token_id in ids("SaSb"):
        bench.engine.say("r", token_id)
    assert (await finished(stream)).choices[0].text == "Sa"


async def test_held_back_text_is_shown_at_the_end(bench: Bench) -> None:
    stream = await bench.start(stop=("END",))
    bench.engine.say("r", *ids("xEN"), finish="length")
    assert (await finished(stream)).choices[0].text == "xEN"


async def test_a_stop_token_that_the_caller_named_is_counted_but_not_shown(bench: Bench) -> None:
    (stop,) = ids("!")
    stream = await bench.start(stop_token_ids=(stop,))
    bench.engine.say("r", *ids("ab"), stop, finish="stop", stop_token_id=stop)
    (choice,) = (await finished(stream)).choices
    assert (choice.text, choice.token_ids) == ("ab", (*ids("ab"), stop))


async def test_logprobs_carry_texts(bench: Bench) -> None:
    stream = await bench.start(logprobs=1)
    (a,), (b,) = ids("a"), ids("b")
    bench.engine.say("r", a, finish="length", logprobs=(TokenLogprobs(token_id=a, logprob=-0.5, top=((b, -1.5),)),))
    logprobs = (await finished(stream)).choices[0].logprobs
    assert logprobs is not None
    assert [(entry.token, entry.logprob, entry.top) for entry in logprobs] == [("a", -0.5, ((b, "b", -1.5),))]


async def test_a_continuation_starts_after_what_was_said(bench: Bench) -> None:
    said = ids("abE")
    stream = await bench.start(call=a_call(said=(said,), seed=99), stop=("END",))
    assert bench.engine.requests["r"].output_token_ids == (said,)
    assert bench.engine.requests["r"].sampling.seed == 99
    bench.engine.say("r", *ids("xNEND"))
    events = await collect(stream)
    first = next(event for event in events if isinstance(event, Delta))
    # "E" had been held back when the first attempt ended, so its text comes now.
    assert (first.seq, first.text_offset, first.text) == (3, 2, "ExN")
    end = events[-1]
    assert isinstance(end, Finished)
    assert (end.choices[0].text, end.usage.completion_tokens) == ("abExN", 8)


async def test_a_choice_that_had_ended_before_is_not_run_again(bench: Bench) -> None:
    stream = await bench.start(n=2, call=a_call(said=(ids("ab"), (*ids("c"), 2))))
    assert bench.engine.requests["r"].ended_choices == (1,)
    bench.engine.say("r", *ids("d"), finish="length")
    end = await finished(stream)
    assert [(choice.text, choice.finish_reason) for choice in end.choices] == [("abd", "length"), ("c", "stop")]


async def test_a_continuation_with_nothing_left_never_reaches_the_engine(bench: Bench) -> None:
    stream = await bench.start(max_tokens=2, call=a_call(said=(ids("ab"),)))
    end = await finished(stream)
    assert (end.choices[0].text, end.choices[0].finish_reason) == ("ab", "length")
    assert bench.engine.requests == {}


async def test_cancelling_ends_with_cancelled_and_keeps_what_was_said(bench: Bench) -> None:
    stream = await bench.start()
    bench.engine.say("r", *ids("ab"))
    await until_text(stream, "ab")
    assert bench.generation.cancel("r")
    events = [event async for event in stream]
    end = events[-1]
    assert isinstance(end, Failed)
    assert (end.error.code, end.choices[0].text, end.choices[0].finish_reason) == ("cancelled", "ab", "cancelled")
    assert not bench.generation.cancel("r")
    assert bench.engine.aborted == ["r"]


async def test_a_caller_that_leaves_aborts_its_request(bench: Bench) -> None:
    async with await bench.start():
        pass
    await wait_until(lambda: bench.engine.aborted == ["r"] and bench.generation.num_running == 0)


async def test_a_caller_that_forgets_its_stream_aborts_its_request(bench: Bench) -> None:
    stream = await bench.start()
    del stream
    gc.collect()
    await wait_until(lambda: bench.engine.aborted == ["r"] and bench.generation.num_running == 0)


async def test_an_engine_that_does_not_answer_an_abort_is_not_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.generation_run.ABORT_GRACE_S", 0.01)
    bench.engine.deaf = True
    stream = await bench.start()
    stream.cancel()
    assert (await failed(stream)).error.code == "cancelled"


async def test_a_time_to_live_ends_a_running_request(bench: Bench) -> None:
    stream = await bench.generation.start(PromptRequest(text="hello", ttl_ms=20), a_call())
    end = await failed(stream)
    assert (end.error.code, end.choices[0].finish_reason) == ("deadline_exceeded", "deadline")


async def test_an_error_of_the_engine_ends_the_request_with_its_code(bench: Bench) -> None:
    stream = await bench.start()
    bench.engine.say("r", *ids("a"))
    bench.engine.say("r", finish="error", error=("numeric_error", "no finite number"))
    end = await failed(stream)
    assert (end.error.code, end.choices[0].text) == ("numeric_error", "a")


async def test_an_unknown_code_of_the_engine_is_internal(bench: Bench) -> None:
    stream = await bench.start()
    bench.engine.say("r", finish="error", error=("strange", "words"))
    assert (await failed(stream)).error.code == "internal"


async def test_the_end_of_the_engine_ends_every_request(bench: Bench) -> None:
    stream = await bench.start()
    await bench.engine.close()
    assert (await failed(stream)).error.code == "engine_failed"


async def test_a_failed_submission_gives_its_room_back(bench: Bench) -> None:
    bench.engine.submit_error = OSError("gone")
    with pytest.raises(OSError, match="gone"):
        await bench.start()
    assert bench.admission.num_requests == 0
    assert bench.spans()["chat tiny"].attributes["error.type"] == "internal"  # type: ignore[index]


async def test_a_running_id_is_refused(bench: Bench) -> None:
    stream = await bench.start()
    with pytest.raises(RequestError) as raised:
        await bench.start()
    assert (raised.value.code, raised.value.field) == ("invalid_field", "request_id")
    await stream.aclose()


async def test_a_full_intake_refuses_and_a_waiting_caller_waits(bench: Bench) -> None:
    streams = [await bench.start(call=a_call(f"r{number}")) for number in range(4)]
    with pytest.raises(RequestError) as raised:
        await bench.start(call=a_call("direct"))
    assert raised.value.code == "overloaded"
    waiting = asyncio.create_task(bench.start(call=a_call("patient", waits=True)))
    await wait_until(lambda: bench.admission.num_waiting == 1)
    for stream in streams[:2]:
        await stream.aclose()
    patient = await waiting
    assert patient.request_id == "patient"
    for stream in (*streams, patient):
        await stream.aclose()


async def test_a_waiting_request_can_be_cancelled(bench: Bench) -> None:
    streams = [await bench.start(call=a_call(f"r{number}")) for number in range(4)]
    waiting = asyncio.create_task(bench.start(call=a_call("patient", waits=True)))
    await wait_until(lambda: bench.admission.num_waiting == 1)
    assert bench.generation.cancel("patient")
    with pytest.raises(RequestError) as raised:
        await waiting
    assert raised.value.code == "cancelled"
    for stream in streams:
        await stream.aclose()


async def test_draining_lets_running_requests_finish_and_ends_the_rest(bench: Bench) -> None:
    quick, slow = await bench.start(call=a_call("quick")), await bench.start(call=a_call("slow"))
    draining = asyncio.create_task(bench.generation.drain(0.2))
    bench.engine.say("quick", *ids("a"), finish="length")
    assert (await finished(quick)).choices[0].text == "a"
    assert (await failed(slow)).error.code == "draining"
    await draining
    with pytest.raises(RequestError) as raised:
        await bench.start(call=a_call("late"))
    assert raised.value.code == "draining"


REFUSALS = [
    ({"temperature": 3.0}, "invalid_field", "sampling.temperature"),
    ({"top_p": 0.0}, "invalid_field", "sampling.top_p"),
    ({"min_p": math.nan}, "invalid_field", "sampling.min_p"),
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


async def test_one_line_a_finished_request_without_its_text(bench: Bench) -> None:
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
