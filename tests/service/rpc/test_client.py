"""What the client asks of a replica, attempt by attempt."""

import grpc
import pytest

from schemas.v1 import inference_pb2
from service.contract import PromptRequest
from service.rpc.client import SluiceClient, SluiceError


class GoneReplica:
    """A stub whose streams all break off; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[inference_pb2.StreamRequest] = []

    def Stream(self, request: inference_pb2.StreamRequest, **_: object) -> "GoneReplica":
        self.asked.append(request)
        return self

    async def read(self) -> None:
        empty = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, empty, empty, "gone")

    def cancel(self) -> None:
        return


async def test_a_stream_that_is_taken_up_again_has_what_is_left_of_its_time() -> None:
    now_s, replica = [5.0], GoneReplica()

    async def sleep(_: float) -> None:
        now_s[0] += 0.25

    async with SluiceClient("127.0.0.1:1", sleep=sleep, clock=lambda: now_s[0]) as client:
        client._endpoints[0].stub = replica  # type: ignore[assignment]
        with pytest.raises(SluiceError) as raised:
            await anext(client.stream(PromptRequest(text="a", ttl_ms=1_000)))
    assert [request.prompt.ttl_ms for request in replica.asked] == [1_000, 750, 500, 250]
    assert raised.value.code == "deadline_exceeded"


async def test_a_stream_without_a_time_to_live_gets_none() -> None:
    replica = GoneReplica()

    async def sleep(_: float) -> None:
        return

    async with SluiceClient("127.0.0.1:1", sleep=sleep) as client:
        client._endpoints[0].stub = replica  # type: ignore[assignment]
        with pytest.raises(SluiceError):
            await anext(client.stream("a"))
    assert {request.prompt.ttl_ms for request in replica.asked} == {0}
