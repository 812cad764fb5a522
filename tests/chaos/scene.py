"""Everything that a run stands on: brokers behind proxies, topics, replica slots, and what the group has committed."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confluent_kafka import IsolationLevel, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

from tests.chaos.history import Barrier, Committed
from tests.chaos.plan import Shape
from tests.chaos.proxy import Proxies
from tests.chaos.recorder import commits_of
from tests.chaos.replica import Replica, Settings
from tests.servers.kafka_cluster import KafkaCluster, cluster
from tests.service.tiny_tokenizer import write_model_dir

TOPICS = ("prompts", "results", "chunks", "dlq", "control")
STABLE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Running brokers behind proxies; scenes follow one another on it."""

    brokers: KafkaCluster
    proxies: Proxies


class Scene:
    """Topics and a group of its own on a stage, and `shape.replicas` replica slots (none started yet)."""

    def __init__(self, shape: Shape, stage: Stage, settings: Settings, *, prefix: str) -> None:
        self.shape, self.settings = shape, settings
        self.brokers, self.proxies = stage.brokers, stage.proxies
        self.prefix, self.group = prefix, prefix + "group"
        self.replicas = [Replica(number, settings) for number in range(shape.replicas)]
        self.admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})

    @property
    def bootstrap(self) -> str:
        """The brokers themselves: what the publisher and the readers use."""
        return self.brokers.bootstrap

    def topic(self, name: str) -> str:
        """With the run's prefix."""
        return self.prefix + name

    async def start_replicas(self) -> None:
        """All of them, one after another where they share cores with everything else."""
        await asyncio.gather(*(replica.start() for replica in self.replicas))

    async def kill_replicas(self) -> None:
        """All of them, at once."""
        await asyncio.gather(*(replica.kill() for replica in self.replicas))

    async def in_sync(self) -> None:
        """Returns once every partition has all its copies in sync: another broker may die then. Raises TimeoutError."""
        async with asyncio.timeout(STABLE_TIMEOUT_S):
            while not await asyncio.to_thread(self._is_in_sync):  # noqa: ASYNC110 - what is waited for tells nobody
                await asyncio.sleep(0.2)

    async def stable(self) -> None:
        """Returns once no transaction is open on the output topics and the group's log. Raises TimeoutError."""
        async with asyncio.timeout(STABLE_TIMEOUT_S):
            while not await asyncio.to_thread(self._is_stable):  # noqa: ASYNC110 - what is waited for tells nobody
                await asyncio.sleep(0.3)

    async def barrier(self, name: str) -> list[Barrier]:
        """What stands committed and written now. No replica may be running."""
        await self.stable()
        return await asyncio.to_thread(self._barrier, name)

    def committed(self) -> dict[int, Committed]:
        """The group's last commit of each input partition, from its log: the client's own answer garbles the metadata (2.16)."""
        found = commits_of(self.bootstrap, self.group, self.topic("prompts"))
        return {commit.partition: commit for commit in sorted(found, key=lambda commit: commit.position)}

    def ends(self, name: str, isolation: IsolationLevel) -> dict[int, int]:
        """The end of each partition's log as a reader of this isolation sees it."""
        topic = name if name.startswith("__") else self.topic(name)
        partitions = self.admin.list_topics(topic, timeout=20).topics[topic].partitions
        asked = {TopicPartition(topic, partition): OffsetSpec.latest() for partition in partitions}
        found = self.admin.list_offsets(asked, isolation_level=isolation, request_timeout=20)
        return {place.partition: future.result().offset for place, future in found.items()}

    def delete_input(self) -> int:
        """Deletes input records below the committed offsets, as retention would; how many partitions had any."""
        lows = [(partition, commit.offset) for partition, commit in self.committed().items() if commit.offset > 0]
        if not lows:
            return 0
        asked = [TopicPartition(self.topic("prompts"), partition, low) for partition, low in lows]
        for future in self.admin.delete_records(asked).values():
            future.result(20)
        return len(lows)

    def _barrier(self, name: str) -> list[Barrier]:
        results = self.ends("results", IsolationLevel.READ_COMMITTED)
        letters = {str(partition): end for partition, end in self.ends("dlq", IsolationLevel.READ_COMMITTED).items()}
        return [
            Barrier(
                name=name,
                partition=partition,
                offset=commit.offset,
                metadata=commit.metadata,
                results_end=results[partition],
                dlq_ends=letters,
            )
            for partition, commit in sorted(self.committed().items())
        ]

    def _is_in_sync(self) -> bool:
        try:
            topics = self.admin.list_topics(timeout=5).topics.values()
        except KafkaException:
            return False
        return all(
            len(part.isrs) == len(part.replicas) and part.leader >= 0 for one in topics for part in one.partitions.values()
        )

    def _is_stable(self) -> bool:
        try:
            return all(
                self.ends(name, IsolationLevel.READ_COMMITTED) == self.ends(name, IsolationLevel.READ_UNCOMMITTED)
                for name in ("results", "dlq", "__consumer_offsets")
            )
        except KafkaException:
            return False


def flags_of(shape: Shape, model_dir: Path, bootstrap: str, prefix: str, overrides: dict[str, Any]) -> tuple[str, ...]:
    """`--set` for a quick replica on the stand-in engine; `overrides` ("section.field" -> value) come last."""
    values: dict[str, Any] = {
        "model.path": str(model_dir),
        "engine.kind": "stand-in",
        "engine.stand_in_tokens_per_s": shape.tokens_per_s,
        "engine.max_restarts": 1_000,
        "grpc.port": 0,
        "admin.port": 0,
        "admin.drain_grace_s": 10,
        "kafka.bootstrap_servers": bootstrap,
        "kafka.group_id": prefix + "group",
        "kafka.topic_prefix": prefix,
        "kafka.session_timeout_ms": shape.session_timeout_ms,
        "kafka.heartbeat_interval_ms": max(100, shape.session_timeout_ms // 10),
        "logging.level": "info",
        "logging.format": "json",
        **overrides,
    }
    return tuple(part for name, value in values.items() for part in ("--set", f"{name}={json.dumps(value)}"))


@asynccontextmanager
async def stage(num_brokers: int, *, tag: str = "chaos") -> AsyncIterator[Stage]:
    """A fresh cluster, ended at the end; the brokers' logs stay as tests/.logs/<tag>-<node>.log."""
    proxies = Proxies(num_brokers)
    running = cluster(num_brokers, advertised_ports=[proxy.port for proxy in proxies.each], name=tag)
    brokers = await asyncio.to_thread(running.__enter__)
    try:
        await proxies.start([broker.proxied_port for broker in brokers.brokers])
        yield Stage(brokers=brokers, proxies=proxies)
    finally:
        await proxies.close()
        await asyncio.to_thread(running.__exit__, None, None, None)


@asynccontextmanager
async def scene(
    on: Stage,
    shape: Shape,
    directory: Path,
    *,
    overrides: dict[str, Any] | None = None,
    mutant: str = "",
    prefix: str = "chaos.",
) -> AsyncIterator[Scene]:
    """Fresh topics, and slots for replicas whose processes are all ended at the end, whatever happened."""
    model_dir = write_model_dir(_made(directory / "model"))
    flags = flags_of(shape, model_dir, on.proxies.bootstrap, prefix, overrides or {})
    here = Scene(
        shape, on, Settings(flags=flags, directory=directory, mutant=mutant, static_members=shape.static_members), prefix=prefix
    )
    await asyncio.to_thread(_create_topics, here)
    try:
        yield here
    finally:
        await here.kill_replicas()


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _create_topics(here: Scene) -> None:
    copies = min(3, len(here.brokers.brokers))
    wanted = [NewTopic(here.topic(name), here.shape.partitions, copies) for name in TOPICS]
    deadline = time.monotonic() + 60
    for future in here.admin.create_topics(wanted, operation_timeout=30).values():
        future.result(60)
    while not here._is_in_sync():
        if time.monotonic() > deadline:
            raise TimeoutError("the topics' copies do not come in sync")
        time.sleep(0.2)
