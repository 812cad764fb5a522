"""The records of the chunk topic, to bytes and back, and what one request had said according to them.

Rules for whoever reads them: `Started` opens an attempt; the highest epoch speaks; its `resume_from` drops what lower epochs said
from there on, so that a late record of an owner that was replaced does no harm; `Handover` ends an attempt in order.
Pure: no client, no clock. Reading never fails: what is no such record is passed over.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from schemas.v1 import events_pb2, inference_pb2
from service import wire
from service.contract import Source
from service.kafka.records import HEADER_CONTENT_TYPE, HEADER_TYPE, InRecord, OutRecord

_T = TypeVar("_T")

ChunkMessage = events_pb2.Started | events_pb2.Chunk | events_pb2.Handover

_KINDS: dict[bytes, type[events_pb2.Started] | type[events_pb2.Chunk] | type[events_pb2.Handover]] = {
    b"started": events_pb2.Started,
    b"chunk": events_pb2.Chunk,
    b"handover": events_pb2.Handover,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}

MAX_STALLED_STARTS = 3
"""Starts one after another that said nothing new and were not handed over: the next one would be no better."""
MAX_STARTS = 9
"""Starts that were not handed over, however far the request came between them."""


def chunk_record(topic: str, source: Source, message: ChunkMessage, media_type: str) -> OutRecord:
    """`message` as a record on the partition of its prompt, keyed by the request id."""
    return OutRecord(
        topic=topic,
        key=source.request_id.encode(),
        partition=source.partition,
        value=wire.to_bytes(message, media_type),
        headers=((HEADER_TYPE, _NAMES[type(message)]), (HEADER_CONTENT_TYPE, media_type.encode())),
    )


def read_chunk_record(record: InRecord) -> ChunkMessage | None:
    """The message of a record of the chunk topic; None for anything else."""
    headers = dict(record.headers)
    kind = _KINDS.get(headers.get(HEADER_TYPE, b""))
    if kind is None or record.value is None:
        return None
    message = kind()
    try:
        if headers.get(HEADER_CONTENT_TYPE, b"") == wire.PROTOBUF.encode():
            message.ParseFromString(record.value)
        else:
            json_format.Parse(record.value, message, ignore_unknown_fields=True)
    except (DecodeError, json_format.ParseError, UnicodeDecodeError):
        return None
    return message


def offset_of(request_id: bytes | None, topic: str, partition: int) -> int:
    """The offset of the prompt that a record's key names, when it stands on this partition; else -1."""
    name, _, digits = (request_id or b"").decode("utf-8", "replace").rpartition("-")
    if name != f"{topic}-{partition}" or not (digits.isascii() and digits.isdigit() and len(digits) <= 19):
        return -1
    return int(digits)


@dataclass(slots=True)
class Said:
    """What one request had said: feed it the request's records in order. `first_offset`: where they begin."""

    first_offset: int
    epoch: int = -1
    attempt: int = 0
    seed: int = 0
    traceparent: str = ""
    handed_over: bool = False
    token_ids: list[list[int]] = field(default_factory=list)
    """One list a choice, without a gap."""
    logprobs: list[list[inference_pb2.TokenLogprobs]] = field(default_factory=list)
    _open_starts: dict[int, int] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def crash_loop(self) -> bool:
        """Whether it was started too often without an end."""
        stalled = sum(before >= self.num_tokens for before in self._open_starts.values())
        return stalled >= MAX_STALLED_STARTS or len(self._open_starts) >= MAX_STARTS

    def feed(self, message: ChunkMessage) -> None:
        """Takes the next record."""
        if isinstance(message, events_pb2.Started):
            self._start(message)
        elif isinstance(message, events_pb2.Chunk):
            self._extend(message)
        else:
            self._open_starts.pop(message.epoch, None)
            self.handed_over = self.handed_over or message.epoch == self.epoch

    def _start(self, started: events_pb2.Started) -> None:
        if started.epoch < self.epoch:
            return
        self.epoch, self.attempt = started.epoch, max(started.attempt, self.attempt)
        self.seed, self.traceparent, self.handed_over = started.seed, started.traceparent, False
        kept: Sequence[int] = started.resume_from or (0,)
        self.token_ids = _cut(self.token_ids, kept)
        self.logprobs = _cut(self.logprobs, kept)
        self._open_starts[started.epoch] = self.num_tokens

    def _extend(self, chunk: events_pb2.Chunk) -> None:
        # A record that was left out leaves a gap: what comes after it cannot be continued from.
        if chunk.epoch != self.epoch or chunk.choice >= len(self.token_ids):
            return
        said = self.token_ids[chunk.choice]
        if chunk.seq == len(said):
            said += chunk.token_ids
            self.logprobs[chunk.choice] += chunk.logprobs


def _cut(lists: list[list[_T]], counts: Sequence[int]) -> list[list[_T]]:
    """The first of each list, as many as counted."""
    return [lists[choice][:count] if choice < len(lists) else [] for choice, count in enumerate(counts)]
