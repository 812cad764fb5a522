"""A real Apache Kafka broker (KRaft, one node) for tests: started as a process, ready when given, stopped by its id.

The jars come through Maven once and stay in the cache directory. `SLUICE_TEST_KAFKA=host:port` names a cluster that runs
elsewhere. `python -m tests.servers.kafka` prints the bootstrap address and runs until Ctrl-C.
"""

import base64
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from service.config import cache_dir
from tests.servers.tied import tie, tied_directory

VERSION = "4.1.0"
SLF4J_VERSION = "1.7.36"
READY_TIMEOUT_S = 180.0
SHORT_LIVED = ("-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
"""For a JVM of a few minutes: a third less processor time than one that goes on compiling (start, 36 topics, 360 transactions:
12 s instead of 18)."""
LOGS = Path(__file__).resolve().parents[1] / ".logs"

_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>sluice.tests</groupId><artifactId>kafka</artifactId><version>1</version>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{VERSION}</version></dependency>
    <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>{SLF4J_VERSION}</version></dependency>
  </dependencies>
</project>
"""


class ServerError(RuntimeError):
    """A test server cannot run here; the message says what to do."""


class KafkaServer:
    """One broker with its own ports and log directory; it keeps both over `stop` and `start`."""

    jvm_flags: tuple[str, ...] = ("-Xmx512m",)

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.bootstrap = f"127.0.0.1:{self.port}"
        self.log = directory / "broker.log"
        self._controller_port = free_port()
        self._directory = directory
        self._properties = directory / "server.properties"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the running broker. Raises `ServerError` when there is none."""
        if self._process is None:
            raise ServerError("the broker does not run")
        return self._process.pid

    def start(self) -> None:
        """Returns once clients are served. Raises `ServerError` with the end of the broker's log."""
        libs = libraries()
        if not self._properties.exists():
            self._format(libs)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["java", *self.jvm_flags, "-cp", f"{libs}/*", "kafka.Kafka", str(self._properties)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        tie(self._process.pid)
        self._wait_ready()

    def stop(self, *, kill: bool = False) -> None:
        """Ends the broker: in order, or at once with `kill`. Its data stay."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _format(self, libs: Path) -> None:
        self._properties.write_text(
            "\n".join(
                [
                    "process.roles=broker,controller",
                    "node.id=1",
                    f"controller.quorum.voters=1@127.0.0.1:{self._controller_port}",
                    f"listeners=PLAINTEXT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{self._controller_port}",
                    f"advertised.listeners=PLAINTEXT://127.0.0.1:{self.port}",
                    "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
                    "controller.listener.names=CONTROLLER",
                    f"log.dirs={self._directory / 'data'}",
                    "offsets.topic.replication.factor=1",
                    "offsets.topic.num.partitions=4",
                    "transaction.state.log.replication.factor=1",
                    "transaction.state.log.min.isr=1",
                    "transaction.state.log.num.partitions=4",
                    "group.initial.rebalance.delay.ms=0",
                    "auto.create.topics.enable=false",
                    "",
                ]
            ),
            encoding="utf-8",
        )
        tool = ["java", *SHORT_LIVED, "-cp", f"{libs}/*", "kafka.tools.StorageTool"]
        subprocess.run([*tool, "format", "-t", new_id(), "-c", str(self._properties)], capture_output=True, check=True)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            try:
                admin.list_topics(timeout=1.0)
            except KafkaException:
                continue
            return
        tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        self.stop(kill=True)
        raise ServerError(f"Apache Kafka {VERSION} did not become ready on {self.bootstrap}; the end of its log:\n{tail}")


@contextmanager
def running(name: str = "kafka", jvm_flags: tuple[str, ...] = KafkaServer.jvm_flags) -> Iterator[KafkaServer]:
    """A fresh broker, ended and removed at the end; the log of the last one stays as tests/.logs/<name>.log."""
    with tied_directory("sluice-kafka-") as directory:
        server = KafkaServer(directory)
        server.jvm_flags = jvm_flags
        with started(server, name):
            yield server


@contextmanager
def started(server: KafkaServer, name: str) -> Iterator[None]:
    """Runs a broker; its log stays."""
    try:
        server.start()
        yield
    finally:
        server.stop()
        # A fixture does not learn whether its tests passed, so the log is always kept.
        keep_log(server, name)


def keep_log(server: KafkaServer, name: str) -> None:
    """Copies the broker's log to tests/.logs."""
    if server.log.exists():
        LOGS.mkdir(exist_ok=True)
        shutil.copy(server.log, LOGS / f"{name}.log")


def new_id() -> str:
    """As Kafka's tool draws them: 16 bytes, URL-safe base64, no dash in front."""
    while (text := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode("ascii").rstrip("=")).startswith("-"):
        pass
    return text


def external() -> str:
    """host:port of the cluster that SLUICE_TEST_KAFKA names, or empty."""
    return os.environ.get("SLUICE_TEST_KAFKA", "")


def libraries() -> Path:
    """The directory of the broker's jars, fetched once under a lock. Raises `ServerError` for missing tools."""
    for tool, package in (("java", "default-jre-headless"), ("mvn", "maven")):
        if shutil.which(tool) is None:
            raise ServerError(
                f"the Kafka tests need `{tool}` (Debian: apt-get install {package}), "
                "or SLUICE_TEST_KAFKA=host:port for a cluster that runs elsewhere"
            )
    root = cache_dir() / "servers" / f"kafka-{VERSION}"
    libs = root / "libs"
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not libs.exists():
            _fetch(root, libs)
    return libs


def _fetch(root: Path, libs: Path) -> None:
    (root / "pom.xml").write_text(_POM, encoding="utf-8")
    partial = root / "libs.partial"
    shutil.rmtree(partial, ignore_errors=True)
    command = ["mvn", "-q", "-B", "-f", str(root / "pom.xml"), "dependency:copy-dependencies", f"-DoutputDirectory={partial}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ServerError(f"Maven could not fetch Apache Kafka {VERSION}:\n{(done.stdout + done.stderr)[-2000:]}")
    # Whole or not at all: a directory that is there is complete.
    partial.rename(libs)


def free_port() -> int:
    """A TCP port on the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> int:
    """Runs a broker until Ctrl-C."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        with running() as server:
            print(server.bootstrap, flush=True)
            stopped.wait()
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
