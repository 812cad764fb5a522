"""One durable request as Kafka has it, wherever it runs or ran: whether it has ended, its result, its chunk records, live or past.

A request id says where the prompt stands; results and chunks stand on the same partition. The group's committed progress says whether
it has ended and from where on its chunks may stand; the prompt's own time says from where on its result may stand. So nothing is read
from the beginning, and a search for a result ends where only later prompts' results can follow.
Bounded: remembered results by `MAX_RESULTS_BYTES`, prompts' times by count. Errors are `RequestError`s.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from schemas.v1 import inference_pb2
from service import wire
from service.contract import Source
from service.errors import RequestError
from service.kafka.chunk_records import ChunkMessage, offset_of, read_chunk_record
from service.kafka.log_reader import LogReader
from service.kafka.reader_fold import Terminal
from service.kafka.records import HEADER_CONTENT_TYPE, InRecord, TopicPartition
from service.kafka.tail import Lapsed, Tail
from service.kafka.topics import Topics

MAX_RESULTS_BYTES = 4_194_304
"""Of results at hand, as they are on the wire; in memory a message takes about four times as much."""
MAX_TIMES = 10_000
CLOCK_SLACK_MS = 300_000
"""How far a producer's clock may be ahead of the replicas' without a longer search."""
FALLBACK_OFFSETS = 50_000
"""Results looked through before the prompt's time when none was found after it."""
MAX_WINDOW = 16_384
"""The largest `kafka.window_offsets`: a prompt's result stands before those of prompts so much later."""
RECENT_MS = 60_000
"""A result may be visible for so long before the offset that says so is committed."""
SILENCE_S = 5.0
_PARTITIONS_S = 60.0
_RETRY_S = 0.5
_MAX_BROKEN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a request stands. `chunks_from`: its chunks stand at or after this offset, -1 when that is not known."""

    source: Source
    prompt_ms: int
    ended: bool
    chunks_from: int


class RequestLog:
    """Reads for one group's requests; `close` its reader and tail elsewhere."""

    def __init__(
        self,
        reader: LogReader,
        tail: Tail,
        topics: Topics,
        *,
        wall_ns: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._reader, self._tail, self._topics = reader, tail, topics
        self._wall_ns, self._clock = wall_ns, clock
        self._silence_s = silence_s
        self._results: dict[str, Terminal] = {}
        self._results_bytes = 0
        self._times: dict[Source, int] = {}
        self._partitions: dict[str, tuple[float, int]] = {}

    def owns(self, request_id: str) -> bool:
        """Whether an id has the form of a durable request's on these topics."""
        source = Source.of(request_id)
        return source is not None and source.topic in self._topics.classes

    def remember(self, terminal: Terminal) -> None:
        """Keeps a durable result for `result`; the oldest go."""
        result = terminal.result
        if result.request_id in self._results:
            return
        self._results[result.request_id] = terminal
        self._results_bytes += result.ByteSize()
        while self._results_bytes > MAX_RESULTS_BYTES:
            self._results_bytes -= self._results.pop(next(iter(self._results))).result.ByteSize()

    def forget(self, topic: str) -> None:
        """What is kept of a topic's requests is true no longer."""
        for request_id in [one for one in self._results if (source := Source.of(one)) is not None and source.topic == topic]:
            self._results_bytes -= self._results.pop(request_id).result.ByteSize()
        self._times = {source: time_ms for source, time_ms in self._times.items() if source.topic != topic}
        self._partitions.pop(topic, None)

    def remembered(self, request_id: str) -> Terminal | None:
        """The result, when it is at hand."""
        return self._results.get(request_id)

    async def place(self, request_id: str) -> Place:
        """Where it stands. Raises `RequestError`: `unknown_request` for an id that names no prompt (any more)."""
        source = Source.of(request_id)
        if source is None or source.topic not in self._topics.classes:
            raise _unknown(f"ids of durable requests are topic-partition-offset, as {self._topics.prompts}-0-17")
        if source.partition >= await self.num_partitions(source.topic):
            raise _unknown(f"{source.topic} has no partition {source.partition}")
        if source not in self._times:
            await self._find_prompt(source)
        low, progress = await self._reader.progress(TopicPartition(source.topic, source.partition))
        bit = source.offset - low
        ended = low >= 0 and (bit < 0 or bool(progress.done >> bit & 1))
        return Place(source=source, prompt_ms=self._times[source], ended=ended, chunks_from=progress.chunk_low)

    async def result(self, place: Place) -> Terminal:
        """The result of a request that has ended. Raises `RequestError` (`unknown_request`) when it is gone."""
        source = place.source
        if (terminal := self._results.get(source.request_id)) is not None:
            return terminal
        partition = TopicPartition(self._topics.results, source.partition)
        begin, end = await self._reader.bounds(partition)
        start = max(begin, await self._by_time(partition, place))
        found = await self._search(partition, source, start, end)
        if found is None:
            found = await self._search(partition, source, max(begin, start - FALLBACK_OFFSETS), start)
        if found is None:
            raise _unknown("it has ended, and its result is gone: the results topic keeps results for a limited time")
        self.remember(found)
        return found

    async def messages(self, place: Place) -> AsyncIterator[ChunkMessage | Terminal]:
        """Its chunk records and, last, its result, as they come. Raises `RequestError`."""
        chunks = TopicPartition(self._topics.chunks, place.source.partition)
        next_chunk = -1 if place.ended else place.chunks_from
        broken = 0
        while not place.ended:
            if next_chunk < 0:
                next_chunk = await self._by_time(chunks, place)
            try:
                async for message, offset in self._follow(place, chunks, next_chunk):
                    broken = 0
                    yield message
                    if isinstance(message, Terminal):
                        return
                    next_chunk = offset + 1
            except Lapsed as lapsed:
                broken += lapsed.broken
                if broken > _MAX_BROKEN:
                    raise RequestError(
                        "broker_unavailable", "the chunks cannot be read now; attach again", retry_after_s=1.0
                    ) from None
                if lapsed.broken:
                    await asyncio.sleep(_RETRY_S)
            place = await self.place(place.source.request_id)
        terminal = await self.result(place)
        if _needs_chunks(terminal.result):
            start = next_chunk if next_chunk >= 0 else await self._by_time(chunks, place)
            for message, _ in await self._chunks(chunks, place.source, start):
                yield message
        yield terminal

    async def _by_time(self, partition: TopicPartition, place: Place) -> int:
        return await self._reader.offset_at(partition, place.prompt_ms - CLOCK_SLACK_MS)

    async def _follow(
        self, place: Place, chunks: TopicPartition, next_chunk: int
    ) -> AsyncIterator[tuple[ChunkMessage | Terminal, int]]:
        """Records of a request that has not ended, with their offsets; ends when it is found to have ended meanwhile. Raises `Lapsed`."""
        source = place.source
        results = TopicPartition(self._topics.results, source.partition)
        async with self._tail.watch(source.partition, source.request_id.encode()) as watch:
            searching = asyncio.create_task(self._recent(results, source, watch.starts[results.topic]))
            searching.add_done_callback(lambda _: watch.wake())
            try:
                for message, offset in await self._chunks(chunks, source, next_chunk, watch.starts[chunks.topic]):
                    next_chunk = offset + 1
                    yield message, offset
                terminal: Terminal | None = None
                while terminal is None:
                    searched = searching.done()
                    records = await watch.take(0 if searched and searching.result() else self._silence_s)
                    for record in records:
                        if record.topic == results.topic:
                            terminal = terminal or read_result(record)
                        elif record.offset >= next_chunk and (said := read_chunk_record(record)) is not None:
                            next_chunk = record.offset + 1
                            yield said, record.offset
                    if searched:
                        terminal = terminal or searching.result()
                        if not records and terminal is None and (await self.place(source.request_id)).ended:
                            return
            finally:
                searching.cancel()
        self.remember(terminal)
        if _needs_chunks(terminal.result):
            # The two topics come without an order between them, and this result does not make up for what was not read.
            for message, offset in await self._chunks(chunks, source, next_chunk):
                yield message, offset
        yield terminal, 0

    async def _recent(self, results: TopicPartition, source: Source, end: int) -> Terminal | None:
        """A result that was written shortly before the watch began, while its offset was not committed yet."""
        start = await self._reader.offset_at(results, self._wall_ns() // 1_000_000 - RECENT_MS)
        return await self._search(results, source, start, end)

    async def _chunks(
        self, partition: TopicPartition, source: Source, start: int, end: int | None = None
    ) -> Sequence[tuple[ChunkMessage, int]]:
        """The request's chunk records in [start, end), with their offsets; `end` None: all that there are now."""
        begin, now = await self._reader.bounds(partition)
        key = source.request_id.encode()
        records = await self._reader.find(
            partition, max(start, begin), now if end is None else end, lambda record: record.key == key
        )
        messages = ((read_chunk_record(record), record.offset) for record in records)
        return [(message, offset) for message, offset in messages if message is not None]

    async def _search(self, partition: TopicPartition, source: Source, start: int, end: int) -> Terminal | None:
        key = source.request_id.encode()

        def enough(record: InRecord) -> bool:
            # Only prompts within the window run at once: none of those before it ends after one behind it.
            return record.key == key or offset_of(record.key, source.topic, source.partition) > source.offset + MAX_WINDOW

        records = await self._reader.find(partition, start, end, lambda record: record.key == key, enough=enough)
        return next(filter(None, map(read_result, records)), None)

    async def _find_prompt(self, source: Source) -> None:
        partition = TopicPartition(source.topic, source.partition)
        begin, end = await self._reader.bounds(partition)
        if source.offset >= end:
            raise _unknown(f"partition {source.partition} of {source.topic} ends at offset {end}")
        if source.offset < begin:
            raise _unknown(
                f"its prompt is gone: {source.topic} begins at offset {begin} now; "
                "`sluice tail --from beginning` shows the results that are left"
            )
        records = await self._reader.find(partition, source.offset, source.offset + 1, lambda record: True)
        if not records:
            raise _unknown("no record stands at this offset")
        if records[0].value is None:
            raise _unknown("the record is a tombstone, which has no result")
        if len(self._times) >= MAX_TIMES:
            del self._times[next(iter(self._times))]
        self._times[source] = min(max(records[0].timestamp, 0), self._wall_ns() // 1_000_000)

    async def num_partitions(self, topic: str) -> int:
        """0 where there is no such topic; what was found is believed for a minute. Raises `RequestError`."""
        asked_s, count = self._partitions.get(topic, (0.0, 0))
        if not count or self._clock() - asked_s > _PARTITIONS_S:
            count = await self._reader.num_partitions(topic)
            self._partitions[topic] = (self._clock(), count)
        return count


def read_result(record: InRecord) -> Terminal | None:
    """The terminal record in a record of the results topic; None for anything else."""
    headers = dict(record.headers)
    result = inference_pb2.Result()
    try:
        if headers.get(HEADER_CONTENT_TYPE, b"") == wire.PROTOBUF.encode():
            result.ParseFromString(record.value or b"")
        else:
            json_format.Parse(record.value or b"", result, ignore_unknown_fields=True)
    except (DecodeError, json_format.ParseError, UnicodeDecodeError):
        return None
    if not result.request_id:
        return None
    return Terminal(result=result, traceparent=headers.get("traceparent", b"").decode("ascii", "replace"))


def _needs_chunks(result: inference_pb2.Result) -> bool:
    """Whether the tokens stand in the chunks alone."""
    return result.error.code == "result_too_large" and not result.choices


def _unknown(message: str) -> RequestError:
    return RequestError("unknown_request", message, field="request_id")
