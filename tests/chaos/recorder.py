"""Reads what a run left on the brokers, with librdkafka: fresh readers of both isolations, one that reads along, the group's log."""

import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient

from tests.chaos.history import Committed, Seen, View

TOPICS = ("results", "dlq", "chunks")
READ_TIMEOUT_S = 60.0
_OFFSETS_TOPIC = "__consumer_offsets"


def consumer(bootstrap: str, *, isolation: str, fetch_wait_ms: int = 500) -> Consumer:
    """A reader that belongs to no group and starts where it is told; it hears so late that a partition has no more."""
    return Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "chaos-reader",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": isolation,
            "log_level": 0,
            "reconnect.backoff.max.ms": 1000,
            "fetch.wait.max.ms": fetch_wait_ms,
            "check.crcs": True,
        }
    )


def partitions_of(bootstrap: str, topic: str) -> list[int]:
    """The topic's partitions."""
    found = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0}).list_topics(topic, timeout=20).topics[topic]
    return sorted(found.partitions)


def read_all(bootstrap: str, topic: str, *, isolation: str, timeout_s: float = READ_TIMEOUT_S) -> list[Message]:
    """Every record from the start of each partition to its end as it is now. Raises TimeoutError."""
    reader = consumer(bootstrap, isolation=isolation, fetch_wait_ms=10)
    try:
        # Asked of the reader itself: one that does not know the leaders yet looks for a beginning half a second later.
        left = set(reader.list_topics(topic, timeout=20).topics[topic].partitions)
        reader.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in left])
        # Where records keep coming, the end is never met.
        ends = {partition: reader.get_watermark_offsets(TopicPartition(topic, partition))[1] for partition in left}
        found: list[Message] = []
        deadline = time.monotonic() + timeout_s
        while left:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{topic} was not read to its end within {timeout_s:g} s; partitions {sorted(left)} are left"
                )
            for message in reader.consume(5_000, 0.05):
                error = message.error()
                if error is None:
                    found.append(message)
                    if message.offset() + 1 >= ends[message.partition()]:
                        left.discard(message.partition())
                elif error.code() == KafkaError._PARTITION_EOF:
                    left.discard(message.partition())
                elif not error.retriable():
                    raise KafkaException(error)
        return found
    finally:
        reader.close()


def seen(message: Message, view: View, prefix: str) -> Seen:
    """A record apart from the client library."""
    headers = dict(message.headers() or [])
    raw = message.value()
    return Seen(
        view=view,
        topic=message.topic().removeprefix(prefix),
        partition=message.partition(),
        offset=message.offset(),
        timestamp_ms=message.timestamp()[1],
        key=(message.key() or b"").decode("utf-8", "replace"),
        type=(headers.get("sluice-type") or b"").decode(),
        value=_content(raw),
    )


def _content(raw: bytes | None) -> dict[str, Any] | None:
    # Replicas that try out the broker's transactions write an aborted record that is no JSON.
    try:
        return None if not raw else _lean(json.loads(raw))
    except ValueError:
        return {"unreadable": raw.hex() if raw else ""}


def _lean(value: dict[str, Any]) -> dict[str, Any]:
    # A dead letter carries the original bytes and their digest, and a result its timings: neither is judged.
    return {
        name: content
        for name, content in value.items()
        if name not in ("original_value", "original_headers", "timings", "usage", "time", "trace_id")
    }


def commits_of(bootstrap: str, group: str, topic: str) -> list[Committed]:
    """Every offset commit that the group made for `topic` and that was not aborted, in the order of its log.

    Reads the group's own topic: the keys and values are `OffsetCommitKey` and `OffsetCommitValue` of Kafka's group coordinator.
    """
    found = []
    for message in read_all(bootstrap, _OFFSETS_TOPIC, isolation="read_committed"):
        key, value = message.key(), message.value()
        if key is None or value is None or struct.unpack_from(">h", key)[0] not in (0, 1):
            continue
        fields = _strings(key, 2, 2)
        (partition,) = struct.unpack_from(">i", key, len(key) - 4)
        if fields != [group, topic]:
            continue
        version, offset = struct.unpack_from(">hq", value)
        start = 10 + (4 if version >= 3 else 0)
        # From version 4 on the record is "flexible": lengths are varints of one more.
        metadata = _compact_string(value, start) if version >= 4 else _strings(value, start, 1)[0]
        found.append(
            Committed(
                position=message.offset(),
                partition=partition,
                offset=offset,
                metadata=metadata,
                timestamp_ms=message.timestamp()[1],
            )
        )
    return found


def _strings(raw: bytes, start: int, count: int) -> list[str]:
    found = []
    for _ in range(count):
        (length,) = struct.unpack_from(">h", raw, start)
        found.append(raw[start + 2 : start + 2 + length].decode())
        start += 2 + length
    return found


def _compact_string(raw: bytes, start: int) -> str:
    length, shift = 0, 0
    while True:
        byte = raw[start]
        length |= (byte & 0x7F) << shift
        start, shift = start + 1, shift + 7
        if byte < 0x80:
            return raw[start : start + length - 1].decode()


class ReaderAlong:
    """A read_committed reader of results and dead letters that reads while the run goes on, in a thread of its own."""

    def __init__(
        self, bootstrap: str, prefix: str, *, on_result: Callable[[int, int], None] = lambda partition, offset: None
    ) -> None:
        """`on_result` hears of each terminal record's source (partition, offset), in the reader's thread."""
        self._bootstrap, self._prefix = bootstrap, prefix
        self._on_result = on_result
        self._stopping = threading.Event()
        self._wanted: dict[tuple[str, int], int] | None = None
        self._thread = threading.Thread(target=self._run, name="reader along", daemon=True)
        self.records: list[Seen] = []
        self.failure: Exception | None = None

    def start(self) -> None:
        self._thread.start()

    def finish(self, timeout_s: float = READ_TIMEOUT_S) -> list[Seen]:
        """Reads on to the present end of each partition and ends. Raises what ended the reader early."""
        self._stopping.set()
        self._thread.join(timeout_s)
        if self.failure is not None:
            raise self.failure
        if self._thread.is_alive():
            raise TimeoutError("the reader that reads along did not come to the end")
        return self.records

    def _run(self) -> None:
        reader = consumer(self._bootstrap, isolation="read_committed")
        try:
            for message in self._messages(reader):
                record = seen(message, "concurrent", self._prefix)
                self.records.append(record)
                if record.topic == "results":
                    source = (record.value or {}).get("source", {})
                    self._on_result(int(source.get("partition", 0)), int(source.get("offset", 0)))
        except Exception as error:  # noqa: BLE001 - told to whoever waits for this thread
            self.failure = error
        finally:
            reader.close()

    def _messages(self, reader: Consumer) -> Iterator[Message]:
        names = [self._prefix + topic for topic in ("results", "dlq")]
        places = [
            TopicPartition(name, number, OFFSET_BEGINNING) for name in names for number in partitions_of(self._bootstrap, name)
        ]
        reader.assign(places)
        left: set[tuple[str, int]] | None = None
        while left is None or left:
            if left is None and self._stopping.is_set():
                # From now on each partition has to be seen at its end once more: ends seen before say nothing.
                left = {(place.topic, place.partition) for place in places}
                reader.assign([TopicPartition(p.topic, p.partition, max(p.offset, 0)) for p in reader.position(places)])
            for message in reader.consume(1_000, 0.1):
                error = message.error()
                if error is None:
                    yield message
                elif error.code() == KafkaError._PARTITION_EOF:
                    if left is not None:
                        left.discard((message.topic(), message.partition()))
                elif not error.retriable() and error.code() != KafkaError._ALL_BROKERS_DOWN:
                    raise KafkaException(error)
