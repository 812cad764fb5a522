"""The proxy before a broker: what passes, and what its faults do to a connection."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import pytest

from tests.chaos.proxy import COMMIT_KEYS, END_TXN, BrokerProxy, Trap

PRODUCE = 0


def frame(key: int, body: bytes = b"x") -> bytes:
    """A request of this API key."""
    payload = key.to_bytes(2, "big") + body
    return len(payload).to_bytes(4, "big") + payload


class Upstream:
    """A broker that answers every request with its own bytes, and keeps what came."""

    def __init__(self) -> None:
        self.came: asyncio.Queue[bytes] = asyncio.Queue()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            while head := await reader.read(4):
                payload = await reader.readexactly(int.from_bytes(head, "big"))
                self.came.put_nowait(payload)
                writer.write(head + payload)
                await writer.drain()


@asynccontextmanager
async def proxied() -> AsyncIterator[tuple[BrokerProxy, Upstream, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A proxy with one connection through it."""
    upstream, proxy = Upstream(), BrokerProxy()
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    proxy.upstream_port = server.sockets[0].getsockname()[1]
    await proxy.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        async with asyncio.timeout(20):
            yield proxy, upstream, reader, writer
    finally:
        writer.close()
        await proxy.close()
        server.close()


async def ended(reader: asyncio.StreamReader) -> bool:
    """Whether the connection ended without a byte."""
    try:
        return await reader.read(1) == b""
    except ConnectionError:
        return True


async def test_requests_and_answers_pass_unchanged() -> None:
    async with proxied() as (_, _, reader, writer):
        writer.write(frame(PRODUCE) + frame(END_TXN))
        assert await reader.readexactly(14) == frame(PRODUCE) + frame(END_TXN)


async def test_a_cut_ends_the_connection() -> None:
    async with proxied() as (proxy, upstream, reader, writer):
        writer.write(frame(PRODUCE))
        await upstream.came.get()
        await reader.readexactly(7)
        await proxy.cut()
        assert await ended(reader)


async def test_half_open_holds_everything_until_it_thaws() -> None:
    async with proxied() as (proxy, upstream, reader, writer):
        proxy.freeze()
        writer.write(frame(PRODUCE))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
        assert upstream.came.empty()
        proxy.thaw()
        assert await reader.readexactly(7) == frame(PRODUCE)


async def test_a_lost_answer_reaches_the_broker_and_never_the_client() -> None:
    async with proxied() as (proxy, upstream, reader, writer):
        proxy.arm(Trap(kind="lost-answer", keys=COMMIT_KEYS))
        writer.write(frame(END_TXN))
        assert await upstream.came.get() == frame(END_TXN)[4:]
        assert await ended(reader)
        assert proxy.num_trapped == 1


async def test_a_late_commit_comes_after_its_connection_has_ended() -> None:
    async with proxied() as (proxy, upstream, reader, writer):
        proxy.arm(Trap(kind="late", keys=COMMIT_KEYS, delay_s=0.2))
        writer.write(frame(END_TXN))
        assert await ended(reader)
        assert upstream.came.empty()
        assert await upstream.came.get() == frame(END_TXN)[4:]


async def test_a_trap_lets_other_requests_pass() -> None:
    async with proxied() as (proxy, _, reader, writer):
        proxy.arm(Trap(kind="late", keys=COMMIT_KEYS))
        writer.write(frame(PRODUCE))
        assert await reader.readexactly(7) == frame(PRODUCE)
        assert proxy.num_trapped == 0
