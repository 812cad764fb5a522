"""Streams over real connections: slow readers, health, reflection, resumption, drain, spans."""

import asyncio
import contextlib

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from schemas.v1 import inference_pb2, inference_pb2_grpc
from service.contract import Delta, Finished, SamplingFields, Started
from service.errors import RequestError, SetupError
from service.rpc.client import Backoff, CallOptions, SluiceClient, SluiceError
from tests.integration.grpc_calls import SERVICE, failure, prompt, read_out, reason
from tests.service.rpc.fakes import WAIT_S, FakeGeneration, serving, token


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
        (span,) = await service.spans(f"{SERVICE}/Stream")
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert span.attributes["rpc.response.status_code"] == status
    assert span.attributes.get("error.type") == refusal
    assert "hello" not in span.to_json()
