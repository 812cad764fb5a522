"""Sluice over Kafka: prompt records in, tokens from the chunks topic, the end of a request from the results topic.

A request ends when its result can be read (committed, where results are transactional). Records of other people's requests are
passed over. A result may be read before the broker's answer to the prompt: what comes for ids that are not known yet is kept, bounded.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from aiokafka.structs import ConsumerRecord

from service import wire
from service.bench.target import TEMPERATURE, Answer, OnTokens, TargetError
from service.bench.workload import Planned
from service.contract import PromptRequest, SamplingFields
from service.errors import SetupError
from service.kafka import Topics
from service.kafka.connection import Connection
from service.kafka.control import cancel_record
from service.kafka.embedded import embedded_cluster

_CONNECT_S = 10.0
_FETCH_WAIT_MS, _EMBEDDED_FETCH_WAIT_MS = 500, 20
"""Kafka answers a fetch when something comes, and each one costs it as much as a record. The embedded broker answers only after this
time, which must not be most of a latency."""
_MAX_EARLY = 4_096


class _Waiting:
    def __init__(self, on_tokens: OnTokens) -> None:
        self.on_tokens = on_tokens
        self.result: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()


class KafkaTarget:
    """`connection`: how the brokers are reached."""

    def __init__(
        self,
        connection: Connection,
        *,
        topic_prefix: str = "sluice.",
        model: str = "",
        ignore_eos: bool = True,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._connection = connection
        self._topics = Topics(topic_prefix)
        self._model = model
        self._ignore_eos = ignore_eos
        self._wall_ns = wall_ns
        self._producer: AIOKafkaProducer | None = None
        self._consumer: AIOKafkaConsumer | None = None
        self._reading: asyncio.Task[None] | None = None
        self._waiting: dict[str, _Waiting] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._early: OrderedDict[str, list[ConsumerRecord]] = OrderedDict()
        self._broken = ""

    async def open(self) -> dict[str, Any]:
        # What the client has to say reaches the person as one error.
        logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
        chunks, results = self._topics.chunks, self._topics.results
        self._producer = AIOKafkaProducer(**self._connection.aiokafka())
        try:
            async with asyncio.timeout(_CONNECT_S):
                await self._producer.start()
                embedded = await self._is_embedded()
                consumer = self._consumer = AIOKafkaConsumer(
                    chunks,
                    results,
                    **self._connection.aiokafka(),
                    auto_offset_reset="latest",
                    isolation_level="read_committed",
                    enable_auto_commit=False,
                    fetch_max_wait_ms=_EMBEDDED_FETCH_WAIT_MS if embedded else _FETCH_WAIT_MS,
                )
                await consumer.start()
                for topic in (chunks, results):
                    if not consumer.partitions_for_topic(topic):
                        raise SetupError(f"topic {topic} does not exist; make it with `sluice topics create`")
                for partition in consumer.assignment():
                    # Placed before anything that is written from now on.
                    await consumer.position(partition)
        except (KafkaError, TimeoutError, OSError) as error:
            raise SetupError(
                f"no Kafka broker serves at {self._connection.bootstrap} "
                f"({await self._connection.explain() or str(error) or type(error).__name__}); start one (`make serve` brings one), "
                "or name yours with --brokers host:port",
                exit_code=3,
            ) from error
        self._broken = ""
        self._reading = asyncio.create_task(self._read(consumer), name="bench results")
        partitions = consumer.partitions_for_topic(results) or ()
        return {
            "target": f"kafka://{self._connection.bootstrap}",
            "embedded_broker": embedded,
            "topic": self._topics.prompts,
            "partitions": len(partitions),
        }

    async def ask(self, planned: Planned, on_tokens: OnTokens) -> Answer:
        assert self._producer is not None
        self._check_reading()
        sampling = SamplingFields(
            max_tokens=planned.max_tokens, temperature=TEMPERATURE, seed=planned.seed, ignore_eos=self._ignore_eos or None
        )
        prompt = PromptRequest(text=planned.text, model=self._model, sampling=sampling)
        try:
            sent = await self._producer.send_and_wait(
                self._topics.prompts,
                wire.to_bytes(wire.prompt_to_proto(prompt)),
                key=str(planned.index).encode(),
                headers=[("content-type", wire.JSON.encode())],
            )
        except KafkaError as error:
            raise TargetError("unavailable", str(error)) from error
        key = f"{sent.topic}-{sent.partition}-{sent.offset}"
        waiting = self._waiting[key] = _Waiting(on_tokens)
        try:
            self._check_reading()
            for record in self._early.pop(key, ()):
                self._take(waiting, record)
            return _answer(await waiting.result)
        except asyncio.CancelledError:
            ending = asyncio.create_task(self._end(self._producer, key), name=f"end {key}")
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)
            raise
        finally:
            del self._waiting[key]

    async def close(self) -> None:
        if self._endings:
            await asyncio.wait(self._endings, timeout=_CONNECT_S)
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        for client in (self._consumer, self._producer):
            if client is not None:
                with contextlib.suppress(KafkaError):
                    await client.stop()
        self._consumer = self._producer = None

    async def _end(self, producer: AIOKafkaProducer, request_id: str) -> None:
        """Asks whoever runs a request to end it."""
        record = cancel_record(self._topics.control, request_id, time_ns=self._wall_ns())
        with contextlib.suppress(KafkaError):
            await producer.send_and_wait(record.topic, record.value, key=record.key, headers=list(record.headers))

    async def _is_embedded(self) -> bool:
        admin = AIOKafkaAdminClient(**self._connection.aiokafka())
        try:
            await admin.start()
            return await embedded_cluster(admin)
        finally:
            await admin.close()

    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        try:
            async for record in consumer:
                key = (record.key or b"").decode("utf-8", "replace")
                waiting = self._waiting.get(key)
                if waiting is not None:
                    self._take(waiting, record)
                    continue
                self._early.setdefault(key, []).append(record)
                if len(self._early) > _MAX_EARLY:
                    self._early.popitem(last=False)
        except KafkaError as error:
            self._broken = str(error) or type(error).__name__
        finally:
            # Whoever waits would wait for ever; requests of later on are refused by `_check_reading`.
            self._broken = self._broken or "nobody reads the results any more"
            for waiting in self._waiting.values():
                if not waiting.result.done():
                    waiting.result.set_exception(TargetError("unavailable", self._broken))

    def _check_reading(self) -> None:
        if self._broken:
            raise TargetError("unavailable", self._broken)

    def _take(self, waiting: _Waiting, record: ConsumerRecord) -> None:
        try:
            value = json.loads(record.value or b"")
        except ValueError:
            return
        if not isinstance(value, dict):
            return
        if record.topic == self._topics.chunks:
            if tokens := value.get("token_ids"):
                waiting.on_tokens(len(tokens))
        elif not waiting.result.done():
            waiting.result.set_result(value)


def _answer(result: dict[str, Any]) -> Answer:
    if result.get("status") != "finished":
        error = result.get("error") or {}
        raise TargetError(str(error.get("code", "internal")), str(error.get("message", "")))
    usage, timings = result["usage"], result["timings"]
    return Answer(
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        cached_prompt_tokens=usage["cached_prompt_tokens"],
        engine_ttft_s=(timings["ttft_ms"] - timings["queue_ms"]) / 1e3,
    )
