"""A small HTTP/1.1 client for event streams: kept-open connections, one request at a time on each, bodies as they come.

Guarantees: a response's body is given in the pieces that came from the network, without waiting for more; a connection is used again
only after its response was read to the end. h11 has the protocol; httpx would add a pool, redirects and 0.1 ms of CPU to each piece.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

import h11

_READ_BYTES = 65_536
_MAX_ERROR_BYTES = 65_536


class HttpError(Exception):
    """The connection failed, or what came is no HTTP."""


@dataclass(frozen=True, slots=True)
class Response:
    """`body` gives the pieces; it is to be read within the `request` block."""

    status: int
    body: AsyncIterator[bytes]


class HttpClient:
    """Requests to one origin, `url` without a path. `headers` go with each."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        self._parts: SplitResult = urlsplit(url)
        secure = self._parts.scheme == "https"
        self._tls = ssl.create_default_context() if secure else None
        self._host = self._parts.hostname or ""
        self._port = self._parts.port or (443 if secure else 80)
        self._headers = [("host", self._parts.netloc.rpartition("@")[2]), *headers.items()]
        self._idle: list[_Connection] = []

    @asynccontextmanager
    async def request(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[Response]:
        """Raises `HttpError`. Leaving the block early closes the connection, which ends the request at the other side."""
        connection = await self._send(method, path, body)
        try:
            yield await connection.response()
        finally:
            if connection.reusable:
                connection.protocol.start_next_cycle()
                self._idle.append(connection)
            else:
                connection.close()

    async def close(self) -> None:
        """Idle connections; those in use end with their block."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    async def _send(self, method: str, path: str, body: bytes) -> "_Connection":
        headers = [*self._headers]
        if body:
            headers += [("content-type", "application/json"), ("content-length", str(len(body)))]
        request = h11.Request(method=method, target=path, headers=headers)
        while self._idle:
            # The other side may have closed it while it was idle: then nothing was served, and a new one is opened.
            connection = self._idle.pop()
            if not connection.reader.at_eof():
                await connection.send(request, body)
                return connection
            connection.close()
        try:
            reader, writer = await asyncio.open_connection(
                self._host, self._port, ssl=self._tls, server_hostname=self._host if self._tls else None
            )
        except OSError as error:
            raise HttpError(f"cannot connect to {self._host}:{self._port} ({error.strerror or error})") from error
        connection = _Connection(reader, writer)
        await connection.send(request, body)
        return connection


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self._writer = reader, writer
        self.protocol = h11.Connection(our_role=h11.CLIENT)

    @property
    def reusable(self) -> bool:
        return self.protocol.our_state is h11.DONE and self.protocol.their_state is h11.DONE

    async def send(self, request: h11.Request, body: bytes) -> None:
        data = self.protocol.send(request) or b""
        if body:
            data += self.protocol.send(h11.Data(data=body)) or b""
        data += self.protocol.send(h11.EndOfMessage()) or b""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise HttpError(str(error)) from error

    async def response(self) -> Response:
        event = await self._next()
        while isinstance(event, h11.InformationalResponse):
            event = await self._next()
        if not isinstance(event, h11.Response):
            raise HttpError("the connection was closed before an answer")
        return Response(event.status_code, self._body())

    async def _body(self) -> AsyncIterator[bytes]:
        while isinstance(event := await self._next(), h11.Data):
            yield bytes(event.data)
        if not isinstance(event, h11.EndOfMessage):
            raise HttpError("the connection was closed within an answer")

    async def _next(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            while (event := self.protocol.next_event()) is h11.NEED_DATA:
                self.protocol.receive_data(await self.reader.read(_READ_BYTES))
        except (h11.RemoteProtocolError, OSError) as error:
            raise HttpError(str(error)) from error
        return event

    def close(self) -> None:
        self._writer.close()


async def events(body: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The `data` of each server-sent event (WHATWG HTML, 9.2.6); comments and other fields are passed over."""
    rest, data = b"", []
    async for piece in body:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" ").decode("utf-8", "replace"))
            elif not line and data:
                yield "\n".join(data)
                data = []


async def whole(body: AsyncIterator[bytes]) -> bytes:
    """The body, cut at 64 KiB: an error's text, or a small answer."""
    found = b""
    async for piece in body:
        found += piece
        if len(found) > _MAX_ERROR_BYTES:
            break
    return found[:_MAX_ERROR_BYTES]
