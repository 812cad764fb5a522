"""The composition root: the only file that constructs. Start order, stop order, and what may fail without the rest.

`Core` is the use case over an engine child; `App` puts the transports, health and metrics around it. Start: what can fail at once
(files, ports) before what takes long (the model). Stop: nobody new, running requests finish for the grace, results flushed, the
engine last. The event loop is the caller's.
"""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import structlog

from engine import EngineError, StepOutput
from schemas.v1 import inference_pb2
from service.addresses import cannot_listen, host_port, listener, split
from service.admission import Admission
from service.config import KafkaSection, Settings
from service.engine_process import EngineProcess, EngineStatus
from service.errors import SetupError
from service.generation import Generation, new_request_id
from service.health import Health, HealthReport
from service.http.admin import AdminServer
from service.kafka.connection import Connection
from service.kafka.embedded import EmbeddedBroker
from service.kafka.topics import Topics
from service.kafka.transport import KafkaTransport
from service.resolution import Limits
from service.rpc.server import RpcServer
from service.rpc.servicer import Inference
from service.streams import Streams
from service.telemetry.logging import fault
from service.telemetry.loop_lag import watch_loop_lag
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import Tracing
from service.tokenization import Tokenization

_log = structlog.get_logger(__name__)

_KAFKA_PART = "kafka"
_WAKES_PER_S_OF_A_CORE = 125
"""Readers' wake-ups, at about 0.25 ms from the engine's output to the client's: 3 % of cores that on a CPU are the engine's too."""


class Core:
    """An engine child and the use case over it, without any transport. `health` follows the engine."""

    def __init__(self, settings: Settings, model_dir: Path, *, keep_spans: bool = False) -> None:
        """`keep_spans` holds ended spans in memory (`tracing.spans()`): for a run that ends. Raises `SetupError`."""
        self.settings = settings
        self.model = settings.model.name or model_dir.name
        self.metrics = Metrics()
        self.health = Health()
        self.tracing = Tracing(settings.tracing, version=version("sluice"), memory=keep_spans)
        self._tokenization = Tokenization(model_dir)
        try:
            config = settings.engine_config(str(model_dir))
        except EngineError as error:
            raise SetupError(str(error)) from error
        self.engine = EngineProcess(config, settings.engine, on_status=self._engine_changed)
        self._streams = Streams(
            on_step=self._stepped,
            pace_s=settings.grpc.coalesce_ms / 1e3,
            max_wakes_per_s=_WAKES_PER_S_OF_A_CORE * len(os.sched_getaffinity(0)),
        )
        self.admission = Admission(settings.admission, concurrency=config.max_num_seqs)
        self.generation = Generation(
            engine=self.engine,
            streams=self._streams,
            tokenization=self._tokenization,
            admission=self.admission,
            limits=Limits(
                model=self.model,
                max_tokens_cap=settings.model.max_tokens_cap,
                max_prompt_bytes=settings.admission.max_prompt_bytes,
            ),
            tracing=self.tracing,
            metrics=self.metrics.requests,
        )
        self._dispatch: asyncio.Task[None] | None = None
        self._deaths = self._restarts = 0

    async def start(self) -> None:
        """Returns once the engine is ready. Raises `SetupError`."""
        # Before the engine: a child that dies while it loads has outputs to say, too.
        self._dispatch = asyncio.create_task(self._hand_out(), name="engine outputs")
        await self.engine.start()

    async def stop(self) -> None:
        """Ends the engine and flushes spans; idempotent."""
        await self.engine.close()
        if self._dispatch is not None:
            await self._dispatch
            self._dispatch = None
        await asyncio.to_thread(self.tracing.shutdown)

    def num_characters(self, model: str, token_ids: Sequence[int]) -> int | None:
        """Characters of a choice that begins so; None for another model than the one served here."""
        return self._tokenization.num_characters(token_ids) if model == self.model else None

    async def _hand_out(self) -> None:
        try:
            await self._streams.run(self.engine.outputs())
        except Exception as error:  # noqa: BLE001 - nobody awaits this while it serves: health says that it is over, and stop goes on
            _log.error("the engine's outputs are no longer handed out", **fault(error))
            self.health.dead(f"the engine's outputs are no longer handed out: {type(error).__name__}")

    def _stepped(self, output: StepOutput) -> None:
        # Step 0 stands for outputs that no engine said.
        if output.stats.step:
            self.metrics.engine.step(output.stats)

    def _engine_changed(self, status: EngineStatus) -> None:
        for _ in range(status.deaths - self._deaths):
            self.metrics.engine.died()
        for _ in range(status.restarts - self._restarts):
            self.metrics.engine.restarted()
        self._deaths, self._restarts = status.deaths, status.restarts
        if status.state == "ready":
            self.health.engine_ready()
        elif status.state == "failed":
            self.health.dead(f"the engine cannot be restarted: {status.reason}")
        elif status.state == "restarting":
            self.health.engine_restarting(status.reason)
        elif status.progress is not None:
            self.health.engine_progress(status.progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """Where a started service listens; host:port. `kafka` is empty when it is switched off."""

    grpc: str
    admin: str
    kafka: str


class App:
    """The whole service."""

    def __init__(self, settings: Settings, model_dir: Path, *, keep_spans: bool = False) -> None:
        """Raises `SetupError`."""
        self.settings = settings
        self.core = Core(settings, model_dir, keep_spans=keep_spans)
        self._broker: EmbeddedBroker | None = None
        self._kafka: KafkaTransport | None = None
        self._rpc: RpcServer | None = None
        self._admin = AdminServer(settings.admin, self.core.health, self.core.metrics)
        self._lag: asyncio.Task[None] | None = None
        self.endpoints: Endpoints | None = None

    async def start(self) -> Endpoints:
        """Returns once requests are taken (Kafka connects on its own time). Raises `SetupError`, and leaves nothing running."""
        try:
            self.endpoints = await self._start()
        except BaseException:
            await self.stop(grace_s=0.0)
            raise
        return self.endpoints

    async def stop(self, grace_s: float | None = None) -> bool:
        """Drains for `grace_s` (default: admin.drain_grace_s) and ends everything; idempotent. True when nothing was cut short."""
        grace = self.settings.admin.drain_grace_s if grace_s is None else grace_s
        core = self.core
        core.health.drain()
        work = [core.generation.drain(grace)]
        if self._rpc is not None:
            work.append(self._rpc.stop(grace))
        kafka = asyncio.create_task(self._kafka.drain(grace)) if self._kafka is not None else None
        await asyncio.gather(*work)
        clean = await kafka if kafka is not None else True
        if self._kafka is not None:
            await self._kafka.readers.close()
        self._kafka = self._rpc = None
        await core.stop()
        if self._lag is not None:
            self._lag.cancel()
            await asyncio.wait({self._lag})
            self._lag = None
        await self._admin.stop()
        if self._broker is not None:
            await self._broker.close()
            self._broker = None
        return clean

    async def _start(self) -> Endpoints:
        settings, core = self.settings, self.core
        self._lag = asyncio.create_task(watch_loop_lag(self.core.metrics), name="loop lag")
        core.health.watch(self._health_changed)
        if settings.kafka.enabled:
            # Loading takes long: credentials and certificates that cannot be read should not be found after it.
            Connection(settings.kafka)
        # Likewise ports that are taken, or equal.
        host, port = settings.grpc.host, settings.grpc.port
        try:
            held = listener(host, port)
        except OSError as error:
            raise cannot_listen("grpc", host, port, error) from error
        with held:
            admin_port = await self._admin.start()
        bootstrap = await self._start_broker(settings.kafka)
        await core.start()
        kafka = self._make_kafka(bootstrap) if settings.kafka.enabled else None
        inference = Inference(
            settings.grpc,
            core.generation,
            spans=core.tracing,
            metrics=core.metrics,
            models=self._models,
            new_request_id=new_request_id,
            durable=None if kafka is None else kafka.readers.durable,
        )
        self._rpc = RpcServer(settings.grpc, inference, core.health)
        grpc_port = await self._rpc.start()
        if kafka is not None:
            core.health.degrade(_KAFKA_PART, f"connecting to {bootstrap}")
            self._kafka = kafka
            await kafka.start()
        return Endpoints(
            grpc=host_port(settings.grpc.host, grpc_port),
            admin=host_port(settings.admin.host, admin_port),
            kafka=bootstrap if settings.kafka.enabled else "",
        )

    def _make_kafka(self, bootstrap: str) -> KafkaTransport:
        core = self.core
        return KafkaTransport(
            self.settings.kafka,
            core.generation,
            spans=core.tracing,
            metrics=core.metrics.kafka,
            bootstrap=bootstrap,
            num_characters=core.num_characters,
            engine_alive=lambda: core.engine.status.alive,
            on_state=self._kafka_changed,
        )

    async def _start_broker(self, kafka: KafkaSection) -> str:
        if not (kafka.enabled and kafka.embedded):
            return kafka.bootstrap_servers
        # The settings are addresses, but may be several.
        if "," in kafka.bootstrap_servers:
            raise SetupError(f"kafka.bootstrap_servers {kafka.bootstrap_servers}: the embedded broker needs one host:port")
        host, port = split(kafka.bootstrap_servers.strip())
        self._broker = EmbeddedBroker(host=host, port=port)
        await self._broker.start(dict.fromkeys(Topics(kafka.topic_prefix).required, kafka.partitions))
        _log.warning("embedded broker: in memory, at least once, not durable", bootstrap=self._broker.bootstrap)
        return self._broker.bootstrap

    def _models(self) -> list[inference_pb2.Model]:
        facts = self.core.engine.facts()
        return [
            inference_pb2.Model(
                name=self.core.model,
                architecture=facts.architecture,
                context_tokens=facts.max_model_len,
                vocabulary=facts.vocab_size,
                dtype=facts.dtype,
                ready=self.core.health.report().ready,
            )
        ]

    def _health_changed(self, report: HealthReport) -> None:
        self.core.metrics.ready(report.ready)

    def _kafka_changed(self, served: bool, reason: str) -> None:
        if served:
            self.core.health.recover(_KAFKA_PART)
            _log.info("kafka connected")
        else:
            self.core.health.degrade(_KAFKA_PART, reason)
            _log.warning("kafka is not served", reason=reason)
