"""The gRPC surface over real connections: statuses, deadlines, disconnects, slow readers, health, reflection, resumption."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from schemas.v1 import inference_pb2, inference_pb2_grpc
from service.contract import Delta, Finished, PromptRequest, SamplingFields, Started
from service.errors import CODES, RequestError, SetupError
from service.rpc.client import Backoff, CallOptions, SluiceClient, SluiceError
from service.rpc.status import DETAILS_KEY, error_of
from tests.service.rpc.fakes import WAIT_S, FakeGeneration, serving, token

SERVICE = "sluice.v1.Inference"


def prompt(**sampling) -> inference_pb2.Prompt:
    return inference_pb2.Prompt(prompt="hello", sampling=inference_pb2.Sampling(**sampling))


async def failure(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, WAIT_S)
    return caught.value


async def read_out(events: AsyncIterator, see: Callable[[Any], object] = lambda event: None) -> None:
    """Reads to the end; `see` gets what comes before an error too."""
    async with asyncio.timeout(WAIT_S):
        async for event in events:
            see(event)


def reason(error: grpc.aio.AioRpcError) -> RequestError:
    read = error_of(tuple(error.trailing_metadata()))
    assert read is not None, error
    return read[0]


async def test_generate_answers_with_the_whole_result():
    async with serving() as service, grpc.aio.insecure_channel(service.target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = inference_pb2.GenerateRequest(prompt=prompt(max_tokens=4, seed=9))
        request.prompt.label = "mine"
        result = await stub.Generate(request)
    assert list(result.choices[0].token_ids) == [token(9, 0, i) for i in range(4)]
    assert (result.status, result.label, result.usage.completion_tokens) == (inference_pb2.Result.finished, "mine", 4)
    assert result.request_id == service.generation.streams[0].request_id


@pytest.mark.parametrize("code", sorted(CODES))
async def test_every_code_reaches_the_client_as_its_status_with_details(code):
    generation = FakeGeneration()
    generation.refusal = RequestError(code, "fixed words", field="sampling.top_p", retry_after_s=1.5)
    async with serving(generation) as service, grpc.aio.insecure_channel(service.target) as channel:
        error = await failure(
            inference_pb2_grpc.InferenceStub(channel).Generate(inference_pb2.GenerateRequest(prompt=prompt()))
        )
    assert error.code().name == CODES[code].grpc
    read = reason(error)
    assert (read.code, read.message, read.field) == (code, "fixed words", "sampling.top_p")
    assert read.retry_after_s == (1.5 if CODES[code].retriable else 0.0)


async def test_the_request_info_of_an_error_holds_the_trace_id():
    generation = FakeGeneration()
    generation.refusal = RequestError("overloaded", "full")
    async with serving(generation) as service, grpc.aio.insecure_channel(service.target) as channel:
        error = await failure(
            inference_pb2_grpc.InferenceStub(channel).Generate(inference_pb2.GenerateRequest(prompt=prompt()))
        )
        (span,) = service.spans(f"{SERVICE}/Generate")
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())[DETAILS_KEY])
    info = error_details_pb2.RequestInfo()
    assert [detail.Unpack(info) for detail in status.details].count(True) == 1
    assert info.serving_data == f"{span.context.trace_id:032x}"


async def test_text_of_an_unexpected_exception_never_reaches_the_client():
    generation = FakeGeneration()
    generation.refusal = ValueError("the secret prompt")
    async with serving(generation) as service, grpc.aio.insecure_channel(service.target) as channel:
        error = await failure(
            inference_pb2_grpc.InferenceStub(channel).Generate(inference_pb2.GenerateRequest(prompt=prompt()))
        )
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in repr(error)
    assert reason(error).code == "internal"


async def test_an_unexpected_exception_in_the_middle_of_a_stream_ends_it_as_internal():
    generation = FakeGeneration()
    generation.crash, generation.fail_at = ValueError("the secret prompt"), 2
    async with serving(generation) as service, SluiceClient(service.target) as client:
        with pytest.raises(SluiceError) as caught:
            await read_out(client.stream("hello"))
    assert caught.value.code == "internal"
    assert "secret" not in str(caught.value)


async def test_a_failure_in_the_middle_is_an_event_and_then_the_status():
    generation = FakeGeneration()
    generation.failure, generation.fail_at = RequestError("numeric_error", "not finite"), 2
    async with serving(generation, coalesce_ms=0) as service, grpc.aio.insecure_channel(service.target) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Stream(inference_pb2.StreamRequest(prompt=prompt()))
        events: list[inference_pb2.StreamEvent] = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_out(call, events.append)
    kinds = [event.WhichOneof("event") for event in events]
    assert (kinds[0], set(kinds[1:-1]), kinds[-1]) == ("started", {"delta"}, "failed")
    assert [token_id for event in events for token_id in event.delta.token_ids] == [token(5, 0, i) for i in range(2)]
    assert reason(caught.value).code == "numeric_error"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"label": "x" * 257}, "label"),
        ({"model": "x" * 257}, "model"),
        ({"metadata": {f"k{i}": "v" for i in range(17)}}, "metadata"),
        ({"sampling": inference_pb2.Sampling(stop=[""])}, "sampling.stop"),
        ({"sampling": inference_pb2.Sampling(stop=["x"] * 17)}, "sampling.stop"),
    ],
)
async def test_a_field_out_of_range_is_named(change, field):
    message = prompt()
    for name, value in change.items():
        if isinstance(value, dict):
            message.metadata.update(value)
        elif isinstance(value, str):
            setattr(message, name, value)
        else:
            message.sampling.CopyFrom(value)
    async with serving() as service, grpc.aio.insecure_channel(service.target) as channel:
        error = await failure(inference_pb2_grpc.InferenceStub(channel).Generate(inference_pb2.GenerateRequest(prompt=message)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason(error).field.startswith(field)


@pytest.mark.parametrize(
    ("said", "n", "seed", "field"),
    [([[1], [2]], 1, 3, "output_token_ids"), ([[1]], 1, None, "sampling.seed")],
)
async def test_a_continuation_that_cannot_be_is_refused(said, n, seed, field):
    request = inference_pb2.StreamRequest(
        prompt=prompt(n=n, **({} if seed is None else {"seed": seed})),
        output_token_ids=[inference_pb2.TokenIds(ids=ids) for ids in said],
    )
    async with serving() as service, grpc.aio.insecure_channel(service.target) as channel:
        error = await failure(inference_pb2_grpc.InferenceStub(channel).Stream(request).read())
    assert reason(error).field == field


@pytest.mark.parametrize("method", ["Generate", "Stream", "Cancel", "Models"])
async def test_bytes_that_are_no_message_are_invalid_protobuf(method):
    async with serving() as service, grpc.aio.insecure_channel(service.target) as channel:
        path = f"/{SERVICE}/{method}"
        call = (
            channel.unary_stream(path)(b"\xff\xff\xff").read()
            if method == "Stream"
            else channel.unary_unary(path)(b"\xff\xff\xff")
        )
        error = await failure(call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason(error).code == "invalid_protobuf"


async def test_a_message_over_the_limit_is_refused_and_the_next_one_served():
    async with serving(max_message_bytes=4096) as service, grpc.aio.insecure_channel(service.target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        error = await failure(stub.Generate(inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(prompt="x" * 8192))))
        result = await stub.Generate(inference_pb2.GenerateRequest(prompt=prompt(max_tokens=1)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert result.status == inference_pb2.Result.finished


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sluice-ttl-ms", "0"),
        ("sluice-ttl-ms", "-1"),
        ("sluice-ttl-ms", "NaN"),
        ("sluice-deadline", "tomorrow"),
        ("sluice-deadline", "2030-01-01T00:00:00"),
        ("sluice-label", "x" * 257),
    ],
)
async def test_metadata_out_of_range_is_named(key, value):
    async with serving() as service, grpc.aio.insecure_channel(service.target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        error = await failure(stub.Generate(inference_pb2.GenerateRequest(prompt=prompt()), metadata=((key, value),)))
    assert reason(error).field == key


@pytest.mark.parametrize(("trusted", "tenant"), [(False, ""), (True, "acme")])
async def test_a_tenant_is_believed_only_where_metadata_is_trusted(trusted, tenant):
    async with serving(trusted_tenant_metadata=trusted) as service, SluiceClient(service.target) as client:
        await client.generate("hello", options=CallOptions(tenant="acme"))
        assert service.generation.streams[0].call.tenant == tenant


async def test_the_deadline_is_the_nearest_of_the_calls_own_and_ttl():
    generation = FakeGeneration()
    async with serving(generation) as service, SluiceClient(service.target) as client:
        await client.generate(PromptRequest(text="a", ttl_ms=500_000), options=CallOptions(timeout_s=1_000))
        await client.generate(PromptRequest(text="a", ttl_ms=5_000_000), options=CallOptions(timeout_s=1_000))
        await client.generate(PromptRequest(text="a"))
    near, far, none = (stream.call.deadline_ns for stream in generation.streams)
    assert 300e9 < far - near < 700e9
    assert none == 0


async def test_a_deadline_that_has_passed_is_refused():
    async with serving() as service, grpc.aio.insecure_channel(service.target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        past = (("sluice-deadline", "2020-01-01T00:00:00Z"),)
        error = await failure(stub.Generate(inference_pb2.GenerateRequest(prompt=prompt()), metadata=past))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_call_whose_deadline_passes_ends_its_request():
    generation = FakeGeneration()
    generation.hold()
    async with serving(generation) as service, SluiceClient(service.target) as client:
        with pytest.raises(SluiceError) as caught:
            await client.generate("hello", options=CallOptions(timeout_s=0.2))
        await generation.until(lambda: generation.aborted)
    assert caught.value.code == "deadline_exceeded"
    assert generation.aborted == ["request-1"]


@pytest.mark.parametrize("detach", [False, True])
async def test_a_disconnect_ends_a_stream_unless_it_is_detached(detach):
    generation = FakeGeneration()
    generation.hold()
    generation.allow(2)
    async with serving(generation) as service:
        async with grpc.aio.insecure_channel(service.target) as channel:
            request = inference_pb2.StreamRequest(prompt=prompt(max_tokens=6), detach=detach)
            call = inference_pb2_grpc.InferenceStub(channel).Stream(request)
            assert (await call.read()).WhichOneof("event") == "started"
            call.cancel()
        if detach:
            await asyncio.wait_for(service.inference.idle(), WAIT_S)
            generation.free()
        await generation.until(lambda: generation.streams[0].closed)
        assert generation.streams[0].ended is detach
        assert generation.aborted == ([] if detach else ["request-1"])


async def test_cancel_ends_a_running_request_and_is_idempotent():
    generation = FakeGeneration()
    generation.hold()
    async with serving(generation) as service, SluiceClient(service.target) as client:
        async with client.stream("hello") as events:
            assert isinstance(await anext(events), Started)
            assert await client.cancel(events.request_id)
            with pytest.raises(SluiceError) as caught:
                await anext(events)
        assert caught.value.code == "cancelled"
        assert not await client.cancel(events.request_id)
        assert not await client.cancel("never-known")


@pytest.mark.parametrize("method", ["Submit", "Get", "Attach"])
async def test_what_is_not_built_says_so(method):
    async with serving() as service, grpc.aio.insecure_channel(service.target) as channel:
        path = f"/{SERVICE}/{method}"
        error = await failure(channel.unary_stream(path)(b"").read() if method == "Attach" else channel.unary_unary(path)(b""))
        (span,) = service.spans(f"{SERVICE}/{method}")
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert error.details().startswith(f"{method} is not built yet")
    assert span.attributes["rpc.response.status_code"] == "UNIMPLEMENTED"


async def test_models_lists_what_is_served():
    async with serving() as service, SluiceClient(service.target) as client:
        (model,) = await client.models()
    assert (model.name, model.ready) == ("fake", True)


async def test_a_reader_that_takes_nothing_is_ended_and_told_how_far_it_got():
    generation = FakeGeneration()
    generation.padding = "x" * 2000
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
    async with serving(generation, slow_reader_timeout_s=0.3, stream_buffer_bytes=8192, coalesce_ms=0) as service:
        async with grpc.aio.insecure_channel(service.target, options=options) as channel:
            call = inference_pb2_grpc.InferenceStub(channel).Stream(inference_pb2.StreamRequest(prompt=prompt(max_tokens=2000)))
            await call.initial_metadata()
            await generation.until(lambda: generation.aborted)
            events: list[inference_pb2.StreamEvent] = []
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_out(call, events.append)
        assert service.metrics.registry.get_sample_value("sluice_slow_readers_ended_total") == 1
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert sum(len(event.delta.token_ids) for event in events) < 2000
    assert "tokens" in reason(caught.value).message


async def test_a_silent_stream_says_that_it_lives():
    generation = FakeGeneration()
    generation.hold()
    async with serving(generation, heartbeat_s=0.05) as service, grpc.aio.insecure_channel(service.target) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Stream(inference_pb2.StreamRequest(prompt=prompt()))
        kinds = [(await call.read()).WhichOneof("event") for _ in range(3)]
        call.cancel()
    assert kinds == ["started", "heartbeat", "heartbeat"]


async def test_health_follows_the_state_through_watch():
    async with serving() as service, grpc.aio.insecure_channel(service.target) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        states = []
        async with asyncio.timeout(WAIT_S):
            while not states or states[-1] != health_pb2.HealthCheckResponse.SERVING:
                states.append((await watch.read()).status)
            service.health.engine_restarting("it died")
            states.append((await watch.read()).status)
            service.health.engine_ready()
            states.append((await watch.read()).status)
        watch.cancel()
    assert states[-3:] == [
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
        health_pb2.HealthCheckResponse.SERVING,
    ]


async def test_reflection_lists_the_service_and_its_methods():
    async with serving() as service, grpc.aio.insecure_channel(service.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        listed = {item.name for item in (await call.read()).list_services_response.service}
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE))
        found = (await call.read()).file_descriptor_response.file_descriptor_proto
        await call.done_writing()
    assert {SERVICE, "grpc.health.v1.Health"} <= listed
    assert any(b"StreamRequest" in raw for raw in found)


async def test_a_port_in_use_names_the_setting():
    async with serving() as service:
        with pytest.raises(SetupError, match=r"grpc\.port"):
            async with serving(port=service.port):
                pass


async def test_a_stream_goes_on_after_its_server_is_replaced_without_a_repeated_or_missing_token():
    first, second = FakeGeneration(), FakeGeneration()
    first.hold()
    first.allow(5)
    tokens: list[int] = []
    kinds: list[type] = []
    async with serving(first, coalesce_ms=0) as service:
        client = SluiceClient(service.target, backoff=Backoff(first_s=0.02, most_s=0.1, attempts=200))
        events = client.stream("hello", sampling=SamplingFields(max_tokens=12))
        while len(tokens) < 5:
            event = await asyncio.wait_for(anext(events), WAIT_S)
            kinds.append(type(event))
            tokens.extend(event.token_ids if isinstance(event, Delta) else ())
        port = service.port
    async with serving(second, coalesce_ms=0, port=port), client:
        async with asyncio.timeout(WAIT_S):
            async for event in events:
                kinds.append(type(event))
                tokens.extend(event.token_ids if isinstance(event, Delta) else ())
    assert tokens == [token(5, 0, i) for i in range(12)]
    assert second.streams[0].call.said == (tuple(tokens[:5]),)
    assert second.streams[0].call.seed == 5
    assert kinds.count(Started) == 1
    assert kinds[-1] is Finished
    assert events.num_resumes >= 1


async def test_draining_tells_open_streams_where_to_go_on():
    generation = FakeGeneration()
    generation.hold()
    generation.allow(3)
    async with serving(generation, coalesce_ms=0) as service, grpc.aio.insecure_channel(service.target) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Stream(inference_pb2.StreamRequest(prompt=prompt()))
        seen = 0
        while seen < 3:
            seen += len((await call.read()).delta.token_ids)
        stopping = asyncio.create_task(service.server.stop(0))
        last = await asyncio.wait_for(call.read(), WAIT_S)
        error = await failure(call.read())
        await stopping
    assert list(last.reset.resume_from) == [3]
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert reason(error).code == "draining"


async def test_stopping_lets_running_calls_finish_within_the_grace_and_refuses_new_ones():
    generation = FakeGeneration()
    generation.hold()
    async with serving(generation) as service, SluiceClient(service.target) as client:
        running = asyncio.create_task(client.generate("hello"))
        await generation.until(lambda: generation.streams)
        stopping = asyncio.create_task(service.server.stop(WAIT_S))
        await asyncio.sleep(0)
        with pytest.raises(SluiceError) as caught:
            await client.generate("another")
        generation.free()
        result = await asyncio.wait_for(running, WAIT_S)
        await asyncio.wait_for(stopping, WAIT_S)
    assert caught.value.code == "draining"
    assert result.status == inference_pb2.Result.finished


async def test_a_client_without_a_replica_ends_after_its_attempts():
    client = SluiceClient("127.0.0.1:1", backoff=Backoff(first_s=0.001, most_s=0.002, attempts=3))
    async with client:
        with pytest.raises(SluiceError) as caught:
            await asyncio.wait_for(anext(client.stream("hello")), WAIT_S)
    assert caught.value.code == "unavailable"
    assert caught.value.retriable


async def test_several_choices_arrive_whole_and_in_order():
    async with serving() as service, SluiceClient(service.target) as client:
        seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
        end = None
        async for event in client.stream("hello", sampling=SamplingFields(n=3, max_tokens=6, seed=4)):
            if isinstance(event, Delta):
                assert event.seq == len(seen[event.choice])
                seen[event.choice].extend(event.token_ids)
            elif isinstance(event, Finished):
                end = event
    assert seen == {choice: [token(4, choice, i) for i in range(6)] for choice in range(3)}
    assert end is not None
    assert [list(choice.token_ids) for choice in end.choices] == list(seen.values())


async def test_correlation_and_request_ids_come_back_as_initial_metadata():
    async with serving() as service, grpc.aio.insecure_channel(service.target) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(
            inference_pb2.GenerateRequest(prompt=prompt()), metadata=(("correlation-id", "abc"),)
        )
        metadata = dict(await call.initial_metadata())
        await call
    assert (metadata["correlation-id"], metadata["sluice-request-id"]) == ("abc", "request-1")


@pytest.mark.parametrize(("refusal", "status"), [(None, "OK"), ("overloaded", "RESOURCE_EXHAUSTED")])
async def test_a_call_has_a_server_span_below_the_callers(refusal, status):
    generation = FakeGeneration()
    generation.refusal = None if refusal is None else RequestError(refusal, "full")
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with serving(generation) as service, SluiceClient(service.target) as client:
        with contextlib.suppress(SluiceError):
            await read_out(client.stream("hello", options=CallOptions(traceparent=parent)))
        await asyncio.wait_for(service.inference.idle(), WAIT_S)
        (span,) = service.spans(f"{SERVICE}/Stream")
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert span.attributes["rpc.response.status_code"] == status
    assert span.attributes.get("error.type") == refusal
    assert "hello" not in span.to_json()
