"""What a server that stops does with what its callers left running."""

import asyncio

import grpc

from schemas.v1 import inference_pb2, inference_pb2_grpc
from service import wire
from service.contract import PromptRequest, SamplingFields
from tests.service.rpc.fakes import WAIT_S, FakeGeneration, Service, serving


async def leave_detached(service: Service) -> None:
    """Begins a stream that is to outlive its call, and leaves it."""
    async with grpc.aio.insecure_channel(service.target) as channel:
        prompt = PromptRequest(text="a", sampling=SamplingFields(max_tokens=6))
        request = inference_pb2.StreamRequest(prompt=wire.prompt_to_proto(prompt), detach=True)
        call = inference_pb2_grpc.InferenceStub(channel).Stream(request)
        await call.read()
        call.cancel()
    await asyncio.wait_for(service.inference.idle(), WAIT_S)


async def test_what_runs_detached_has_the_grace_to_finish() -> None:
    generation = FakeGeneration()
    generation.hold()
    async with serving(generation) as service:
        await leave_detached(service)
        stopping = asyncio.create_task(service.server.stop(WAIT_S))
        # Past the drain: with no call running, only what is detached holds it up.
        await asyncio.wait({stopping}, timeout=0.3)
        generation.free()
        await asyncio.wait_for(stopping, WAIT_S)
    assert (generation.streams[0].ended, generation.aborted) == (True, [])


async def test_what_runs_detached_is_ended_after_the_grace() -> None:
    generation = FakeGeneration()
    generation.hold()
    async with serving(generation) as service:
        await leave_detached(service)
        await asyncio.wait_for(service.server.stop(0.0), WAIT_S)
    assert (generation.streams[0].closed, generation.aborted) == (True, ["request-1"])
