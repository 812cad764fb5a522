"""Several real Apache Kafka brokers (KRaft, each broker and controller) as processes that may be killed, stopped and started.

Each broker has two client listeners: `bootstrap` is direct; `proxied` is advertised under ports that the caller gives, so that
clients which start there speak to every broker through whatever listens on them. Timeouts are short: a dead broker's partitions
move within about three seconds.
"""

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.servers.kafka import LOGS, SHORT_LIVED, KafkaServer, format_as, free_port, new_id
from tests.servers.tied import tied_directory


class ClusterBroker(KafkaServer):
    """Node `node_id` of a cluster. `proxied_port` is where its second listener listens, `advertised_port` what it tells clients."""

    # Three virtual machines share two cores with everything else: the quick compiler and one collector thread are enough.
    jvm_flags = SHORT_LIVED

    def __init__(self, directory: Path, *, node_id: int, advertised_port: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        super().__init__(directory)
        self.node_id = node_id
        self.proxied_port = free_port()
        self.controller_port = free_port()
        self._advertised_port = advertised_port or self.proxied_port
        self._data = directory / "data"

    def prepare(self, voters: str, num_brokers: int) -> None:
        """Writes its settings."""
        copies, in_sync = min(3, num_brokers), min(2, num_brokers)
        self._properties.write_text(
            "\n".join(
                [
                    "process.roles=broker,controller",
                    f"node.id={self.node_id}",
                    f"controller.quorum.voters={voters}",
                    f"listeners=PLAINTEXT://127.0.0.1:{self.port},PROXIED://127.0.0.1:{self.proxied_port},"
                    f"CONTROLLER://127.0.0.1:{self.controller_port}",
                    f"advertised.listeners=PLAINTEXT://127.0.0.1:{self.port},PROXIED://127.0.0.1:{self._advertised_port}",
                    "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT",
                    "inter.broker.listener.name=PLAINTEXT",
                    "controller.listener.names=CONTROLLER",
                    f"log.dirs={self._data}",
                    f"default.replication.factor={copies}",
                    f"min.insync.replicas={in_sync}",
                    f"offsets.topic.replication.factor={copies}",
                    "offsets.topic.num.partitions=3",
                    f"transaction.state.log.replication.factor={copies}",
                    f"transaction.state.log.min.isr={in_sync}",
                    "transaction.state.log.num.partitions=3",
                    "transaction.abort.timed.out.transaction.cleanup.interval.ms=1000",
                    "group.initial.rebalance.delay.ms=0",
                    "group.min.session.timeout.ms=1000",
                    "broker.session.timeout.ms=3000",
                    "broker.heartbeat.interval.ms=500",
                    "controller.quorum.election.timeout.ms=1000",
                    "controller.quorum.fetch.timeout.ms=2000",
                    "replica.lag.time.max.ms=5000",
                    "log.message.timestamp.type=LogAppendTime",
                    "auto.create.topics.enable=false",
                    "num.network.threads=2",
                    "num.io.threads=4",
                    "",
                ]
            ),
            encoding="utf-8",
        )

    def format(self, cluster_id: str) -> None:
        """Makes its log directory."""
        format_as(self._data, node_id=self.node_id, cluster_id=cluster_id)


class KafkaCluster:
    """All brokers. `brokers[i]` may be stopped, killed and started by itself."""

    def __init__(self, directory: Path, *, num_brokers: int = 3, advertised_ports: Sequence[int] = ()) -> None:
        ports = advertised_ports or [0] * num_brokers
        self.brokers = [
            ClusterBroker(directory / f"broker-{index + 1}", node_id=index + 1, advertised_port=ports[index])
            for index in range(num_brokers)
        ]
        self.bootstrap = ",".join(broker.bootstrap for broker in self.brokers)

    def start(self) -> None:
        """Returns once every broker serves. Raises `ServerError`."""
        voters = ",".join(f"{broker.node_id}@127.0.0.1:{broker.controller_port}" for broker in self.brokers)
        cluster_id = new_id()
        for broker in self.brokers:
            broker.prepare(voters, len(self.brokers))
            broker.format(cluster_id)
        with ThreadPoolExecutor(len(self.brokers)) as pool:
            list(pool.map(lambda broker: broker.start(), self.brokers))

    def stop(self) -> None:
        """Ends every broker; the cluster is not meant to be started again."""
        for broker in self.brokers:
            broker.stop(kill=True)


@contextmanager
def cluster(num_brokers: int = 3, *, advertised_ports: Sequence[int] = (), name: str = "cluster") -> Iterator[KafkaCluster]:
    """A fresh cluster, ended and removed at the end; the brokers' logs stay as tests/.logs/<name>-<node>.log."""
    with tied_directory("sluice-cluster-") as directory:
        brokers = KafkaCluster(directory, num_brokers=num_brokers, advertised_ports=advertised_ports)
        try:
            brokers.start()
            yield brokers
        finally:
            brokers.stop()
            LOGS.mkdir(parents=True, exist_ok=True)
            for broker in brokers.brokers:
                if broker.log.exists():
                    shutil.copy(broker.log, LOGS / f"{name}-{broker.node_id}.log")
