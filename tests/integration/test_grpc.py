"""The gRPC surface over real connections: results, statuses, refusals, deadlines, disconnects, metadata."""

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from schemas.v1 import inference_pb2, inference_pb2_grpc
from service.contract import PromptRequest, Started
from service.errors import CODES, RequestError
from service.rpc.client import CallOptions, SluiceClient, SluiceError
from service.rpc.status import DETAILS_KEY
from tests.integration.grpc_calls import SERVICE, failure, prompt, read_out, reason
from tests.service.rpc.fakes import WAIT_S, FakeGeneration, serving, token


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
        (span,) = await service.spans(f"{SERVICE}/Generate")
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
async def test_what_needs_kafka_says_so_where_there_is_none(method):
    async with serving() as service, grpc.aio.insecure_channel(service.target) as channel:
        path = f"/{SERVICE}/{method}"
        error = await failure(channel.unary_stream(path)(b"").read() if method == "Attach" else channel.unary_unary(path)(b""))
        (span,) = await service.spans(f"{SERVICE}/{method}")
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert error.details().startswith(f"{method} needs Kafka")
    assert span.attributes["rpc.response.status_code"] == "UNIMPLEMENTED"


async def test_models_lists_what_is_served():
    async with serving() as service, SluiceClient(service.target) as client:
        (model,) = await client.models()
    assert (model.name, model.ready) == ("fake", True)
