"""The engine's wire: length-prefixed frames on one inherited socket pair, each a kind and a MessagePack payload.

Frame: u32 little-endian length of what follows (<= 16 MiB), u8 kind, payload. Payloads are the border dataclasses, validated
on decode: a frame that decodes holds only values in range. Anything else raises `FrameError`, after which the stream is dead.
Standard library and msgspec only; no I/O here: bytes in, frames out.
"""

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.errors import FrameError
from engine.output import EngineFacts, EngineFailure, EngineProgress, StepOutput
from engine.request import Request

PROTOCOL_VERSION = 2
MAX_FRAME_BYTES = 16 * 1024 * 1024
_HEADER = struct.Struct("<IB")


class FrameKind(enum.IntEnum):
    """HELLO, OUTPUT, STATS and FATAL come from the child; ADD, ABORT and CLOSE from the parent."""

    HELLO = 1
    ADD = 2
    ABORT = 3
    OUTPUT = 4
    STATS = 5
    FATAL = 6
    CLOSE = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The child is ready: the protocol that it speaks and what it serves."""

    protocol_version: int
    facts: EngineFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """End a request at the next step boundary; unknown ids are ignored (it may have ended on the way)."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """The child ends its loop and exits 0."""


Payload = Hello | Request | Abort | StepOutput | EngineProgress | EngineFailure | Close

_TYPES: dict[FrameKind, type[Any]] = {
    FrameKind.HELLO: Hello,
    FrameKind.ADD: Request,
    FrameKind.ABORT: Abort,
    FrameKind.OUTPUT: StepOutput,
    FrameKind.STATS: EngineProgress,
    FrameKind.FATAL: EngineFailure,
    FrameKind.CLOSE: Close,
}
_KINDS = {payload_type: kind for kind, payload_type in _TYPES.items()}
_DECODERS = {kind: msgspec.msgpack.Decoder(payload_type) for kind, payload_type in _TYPES.items()}
_ENCODER = msgspec.msgpack.Encoder()


def encode(payload: Payload) -> bytes:
    """One frame. Raises `FrameError` when it would pass 16 MiB."""
    body = _ENCODER.encode(payload)
    if len(body) + 1 > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _HEADER.pack(len(body) + 1, _KINDS[type(payload)]) + body


class FrameDecoder:
    """Turns a byte stream, cut anywhere, into payloads. Holds at most one unfinished frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Payload]:
        """Yields every payload that `data` completes. Raises `FrameError` for a bad length, kind or payload."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _HEADER.size:
                length, kind = _HEADER.unpack_from(self._buffer, start)
                if not 1 <= length <= MAX_FRAME_BYTES:
                    raise FrameError(f"a frame claims {length} bytes; the limit is {MAX_FRAME_BYTES}")
                end = start + 4 + length
                if len(self._buffer) < end:
                    return
                decoder = _DECODERS.get(kind)
                if decoder is None:
                    raise FrameError(f"unknown frame kind {kind}")
                body = bytes(memoryview(self._buffer)[start + _HEADER.size : end])
                start = end
                try:
                    yield decoder.decode(body)
                except msgspec.MsgspecError as error:
                    raise FrameError(f"a {FrameKind(kind).name} frame does not decode: {error}") from error
        finally:
            del self._buffer[:start]
