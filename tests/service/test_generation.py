"""The one use case over a fake engine: what is said, and how everything ends."""

import asyncio
import gc

import pytest

from engine import TokenLogprobs
from service.contract import Delta, Failed, Finished, PromptRequest
from service.errors import RequestError
from service.generation import GenerationStream
from tests.service.generation_bench import (
    Bench,
    a_call,
    collect,
    failed,
    finished,
    ids,
    until_text,
    wait_until,
)


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
    # The attempt that said the first three counted them.
    counted = bench.metrics.registry.get_sample_value("sluice_completion_tokens_total", {"model": "tiny", "transport": "grpc"})
    assert counted == 5


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


async def test_a_running_id_is_to_come_again(bench: Bench) -> None:
    stream = await bench.start()
    with pytest.raises(RequestError) as raised:
        await bench.start()
    assert (raised.value.code, raised.value.retry_after_s > 0) == ("overloaded", True)
    await stream.aclose()


async def test_an_id_that_the_engine_has_not_ended_is_to_come_again(bench: Bench) -> None:
    bench.engine.submit_error = ValueError("request r is outstanding already")
    with pytest.raises(RequestError) as raised:
        await bench.start()
    assert raised.value.code == "overloaded"
    bench.engine.submit_error = None
    async with await bench.start() as stream:
        assert stream.request_id == "r"


async def test_a_full_intake_refuses_and_a_waiting_caller_waits(bench: Bench) -> None:
    streams = [await bench.start(call=a_call(f"r{number}")) for number in range(4)]
    with pytest.raises(RequestError) as raised:
        await bench.start(call=a_call("direct"))
    assert raised.value.code == "overloaded"
    waiting = asyncio.create_task(bench.start(call=a_call("patient", waits=True)))
    await wait_until(lambda: bench.admission.num_waiting == 1)
    assert bench.metrics.registry.get_sample_value("sluice_queue_depth") == 1
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


async def test_a_request_cancelled_while_its_prompt_is_encoded_never_stands_in_line(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [await bench.start(call=a_call(f"r{number}")) for number in range(4)]
    monkeypatch.setattr("service.tokenization.INLINE_BYTES", 0)
    entering = asyncio.create_task(bench.start(call=a_call("patient", waits=True)))
    await wait_until(lambda: bench.generation.cancel("patient"))
    assert bench.admission.num_waiting == 0
    with pytest.raises(RequestError) as raised:
        await asyncio.wait_for(entering, 10)
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
