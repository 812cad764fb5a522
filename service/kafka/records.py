"""The records that this transport reads and writes, apart from any client library's types."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

Headers = tuple[tuple[str, bytes], ...]

HEADER_TYPE = "sluice-type"
HEADER_CONTENT_TYPE = "content-type"
HEADER_LABEL = "sluice-label"
HEADER_TENANT = "sluice-tenant"
HEADER_DEADLINE = "sluice-deadline"
HEADER_TTL = "sluice-ttl-ms"
HEADER_REPLY_TO = "sluice-reply-to"
HEADER_CORRELATION = "correlation-id"
HEADER_CONVERSATION = "sluice-conversation-id"
HEADER_IDEMPOTENCY = "sluice-idempotency-key"
HEADER_PROMPT_DIGEST = "sluice-prompt-digest"
HEADER_DUPLICATE_OF = "sluice-duplicate-of"
HEADER_REPLAY_OF = "sluice-replay-of"


class TopicPartition(NamedTuple):
    """Equal to, and usable as, aiokafka's type of the same name."""

    topic: str
    partition: int


class InRecord(Protocol):
    """A consumed record, as aiokafka gives it. `timestamp`: milliseconds since the epoch, -1 when the broker has none."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OutRecord:
    """A record to write. `partition` None: by the key's hash."""

    topic: str
    value: bytes
    key: bytes | None = None
    partition: int | None = None
    headers: Headers = ()

    @property
    def num_bytes(self) -> int:
        """What it takes in a record batch, near enough: a few bytes of framing are left out."""
        return len(self.value) + len(self.key or b"") + sum(len(name) + len(value) for name, value in self.headers)
