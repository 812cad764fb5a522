"""A TCP proxy before one broker that knows Kafka's request frames: delays, half-open connections, cuts, and what may happen to a commit.

Faults act on every connection that exists while they last. Time is real; nothing here is drawn: callers give numbers.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

OFFSET_COMMIT, ADD_OFFSETS_TO_TXN, END_TXN, TXN_OFFSET_COMMIT = 8, 25, 26, 28
COMMIT_KEYS = frozenset({OFFSET_COMMIT, ADD_OFFSETS_TO_TXN, END_TXN, TXN_OFFSET_COMMIT})
"""Requests that move progress (Kafka protocol guide, "API keys")."""
ENDING_KEYS = frozenset({OFFSET_COMMIT, END_TXN})
"""Those after which it has moved."""

_COPY_BYTES = 65_536
_MAX_FRAME_BYTES = 104_857_600

TrapKind = Literal["lost-answer", "late"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trap:
    """What happens to the next request with one of `keys`.

    `lost-answer`: the broker gets it, the client's connection is cut before the answer. `late`: the connection is cut first and the
    broker gets the request `delay_s` later (the delayed commit that ends somebody else's transaction).
    """

    kind: TrapKind
    keys: frozenset[int]
    delay_s: float = 0.0


class BrokerProxy:
    """Listens on `port` from construction on (so that it can be advertised), forwards once `upstream_port` is set."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._socket.getsockname()[1]
        self.upstream_port = 0
        self.delay_s = 0.0
        self.commit_delay_s = 0.0
        self.num_trapped = 0
        self._traps: list[Trap] = []
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Forwards connections."""
        self._server = await asyncio.start_server(self._serve, sock=self._socket)

    async def close(self) -> None:
        """Cuts everything and listens no more."""
        if self._server is not None:
            self._server.close()
            await self.cut()
            await self._server.wait_closed()

    async def cut(self) -> None:
        """Ends every connection that there is now, with what was on its way."""
        tasks = tuple(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def freeze(self) -> None:
        """Half-open: connections stay, nothing passes either way, new ones are accepted and left alone."""
        self._flowing.clear()

    def thaw(self) -> None:
        """What was held back passes."""
        self._flowing.set()

    def arm(self, trap: Trap) -> None:
        """Sets a trap for the next request that fits."""
        self._traps.append(trap)

    def disarm(self) -> None:
        """Forgets traps that nothing has walked into."""
        self._traps.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        there: asyncio.StreamWriter | None = None
        try:
            await self._flowing.wait()
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                from_broker, there = await asyncio.open_connection("127.0.0.1", self.upstream_port)
                await self._forward(reader, writer, from_broker, there)
        except asyncio.CancelledError:
            # Only `cut` and `close` cancel.
            pass
        finally:
            for end in (writer, there):
                if end is not None:
                    end.transport.abort()
            self._connections.discard(task)

    async def _forward(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        from_broker: asyncio.StreamReader,
        there: asyncio.StreamWriter,
    ) -> None:
        ways = [
            asyncio.ensure_future(self._requests(reader, writer, from_broker, there)),
            asyncio.ensure_future(self._answers(from_broker, writer)),
        ]
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            # The answers end when a trap has taken the connection over: its way ends by itself.
            if ways[0] not in done and writer.transport.is_closing():
                await ways[0]
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _requests(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        from_broker: asyncio.StreamReader,
        there: asyncio.StreamWriter,
    ) -> None:
        while True:
            head = await reader.readexactly(4)
            size = int.from_bytes(head, "big")
            if size > _MAX_FRAME_BYTES:
                return
            frame = await reader.readexactly(size)
            key = int.from_bytes(frame[:2], "big")
            if trap := self._spring(key):
                writer.transport.abort()
                await asyncio.sleep(trap.delay_s)
                there.write(head + frame)
                await there.drain()
                # Time for the broker to take it in: closing at once could lose it.
                await asyncio.sleep(0.5)
                return
            await self._hold(self.delay_s + (self.commit_delay_s if key in COMMIT_KEYS else 0.0))
            there.write(head + frame)
            await there.drain()

    async def _answers(self, from_broker: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await from_broker.read(_COPY_BYTES):
            await self._hold(self.delay_s)
            if writer.transport.is_closing():
                return
            writer.write(data)
            await writer.drain()

    async def _hold(self, delay_s: float) -> None:
        if delay_s:
            await asyncio.sleep(delay_s)
        await self._flowing.wait()

    def _spring(self, key: int) -> Trap | None:
        for trap in self._traps:
            if key in trap.keys:
                self._traps.remove(trap)
                self.num_trapped += 1
                return trap
        return None


class Proxies:
    """One proxy a broker; a fault acts on all of them, or on one."""

    def __init__(self, num_brokers: int) -> None:
        self.each = [BrokerProxy() for _ in range(num_brokers)]

    @property
    def bootstrap(self) -> str:
        """Where clients start that are to go through the proxies."""
        return ",".join(f"127.0.0.1:{proxy.port}" for proxy in self.each)

    async def start(self, upstream_ports: list[int]) -> None:
        """Forwards to these ports, in the order of the brokers."""
        for proxy, port in zip(self.each, upstream_ports, strict=True):
            proxy.upstream_port = port
            await proxy.start()

    async def close(self) -> None:
        """Cuts everything."""
        await asyncio.gather(*(proxy.close() for proxy in self.each))

    def apply(self, change: Callable[[BrokerProxy], None]) -> None:
        """The same to each."""
        for proxy in self.each:
            change(proxy)
