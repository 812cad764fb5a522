"""What the tests of the gRPC surface say and read: a prompt, a failed call, a stream to its end."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from schemas.v1 import inference_pb2
from service.errors import RequestError
from service.rpc.status import error_of
from tests.service.rpc.fakes import WAIT_S

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
