"""A real Apache Kafka broker (KRaft, one node) for tests: started as a process, ready when given, stopped by its id.

The jars come through Maven once and stay in the cache directory. `SLUICE_TEST_KAFKA=host:port` names a cluster that runs
elsewhere. `python -m tests.servers.kafka` prints the bootstrap address and runs until Ctrl-C.
"""

import base64
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
TWO_CORES = ("num.network.threads=1", "num.io.threads=2")
"""For a broker that has no more cores: an eighth less processor time than with the eleven threads that are the default."""
LOGS = Path(__file__).resolve().parents[1] / ".logs" / os.environ.get("PYTEST_XDIST_WORKER", "")
_NEVER_GIVEN = range(20_000, 32_000)
"""Linux gives from 32,768 on. Not drawn by `random`, whose seed test runs side by side share."""

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
    settings: tuple[str, ...] = ()

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
            self._format()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["java", *self.jvm_flags, *_archived(), "-cp", f"{libs}/*", "kafka.Kafka", str(self._properties)],
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

    def _format(self) -> None:
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
                    *self.settings,
                    "",
                ]
            ),
            encoding="utf-8",
        )
        format_as(self._directory / "data", node_id=1, cluster_id=new_id())

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
def running(
    name: str = "kafka", jvm_flags: tuple[str, ...] = KafkaServer.jvm_flags, settings: tuple[str, ...] = ()
) -> Iterator[KafkaServer]:
    """A fresh broker, ended and removed at the end; the log of the last one stays as tests/.logs/<name>.log."""
    with tied_directory("sluice-kafka-") as directory:
        server = KafkaServer(directory)
        server.jvm_flags, server.settings = jvm_flags, settings
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
        LOGS.mkdir(parents=True, exist_ok=True)
        shutil.copy(server.log, LOGS / f"{name}.log")


def format_as(data: Path, *, node_id: int, cluster_id: str) -> None:
    """Makes a broker's log directory. A copy of one that Kafka's own tool made, which takes a virtual machine: only ids differ."""
    shutil.copytree(_formatted(), data)
    ids = {"cluster.id": cluster_id, "directory.id": new_id(), "node.id": str(node_id)}
    file = data / "meta.properties"
    kept = [line for line in file.read_text("utf-8").splitlines() if line.partition("=")[0] not in ids]
    file.write_text("\n".join([*kept, *(f"{name}={value}" for name, value in ids.items()), ""]), "utf-8")


def _formatted() -> Path:
    """A formatted log directory in the cache, made once."""
    libs = libraries()
    made = libs.parent / "formatted"
    with _locked(libs.parent):
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=libs.parent) as name:
                properties, data = Path(name) / "server.properties", Path(name) / "data"
                properties.write_text(
                    "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@127.0.0.1:9093\n"
                    f"listeners=PLAINTEXT://127.0.0.1:9092,CONTROLLER://127.0.0.1:9093\ncontroller.listener.names=CONTROLLER\n"
                    f"log.dirs={data}\n",
                    encoding="utf-8",
                )
                tool = ["java", *SHORT_LIVED, "-cp", f"{libs}/*", "kafka.tools.StorageTool"]
                subprocess.run([*tool, "format", "-t", new_id(), "-c", str(properties)], capture_output=True, check=True)
                data.rename(made)
    return made


def prepare() -> None:
    """Fetches the jars, and keeps what a broker loads as it starts in an archive of classes: with it one starts twice as fast."""
    archive = _archive(libraries())
    if archive.exists():
        return
    partial = archive.with_name(f"{archive.name}.{os.getpid()}")
    with running("archive", (*SHORT_LIVED, f"-XX:ArchiveClassesAtExit={partial}")):
        pass
    # Not there where the machine is of another kind: brokers start without it.
    if partial.exists():
        partial.rename(archive)


def _archive(libs: Path) -> Path:
    """Of this very Java: another does not take it."""
    java = Path(shutil.which("java") or "java").resolve()
    return libs.parent / f"classes-{int(java.stat().st_mtime)}.jsa"


def _archived() -> tuple[str, ...]:
    archive = _archive(libraries())
    return (f"-XX:SharedArchiveFile={archive}",) if archive.exists() else ()


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
    with _locked(root):
        if not libs.exists():
            _fetch(root, libs)
    return libs


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
    """A TCP port on the loopback that nobody listens on now, nor is given who asks for any port before a server listens there."""
    while True:
        port = secrets.choice(_NEVER_GIVEN)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
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
