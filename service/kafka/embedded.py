"""librdkafka's in-process broker on a chosen port, for a first try without anything installed.

It speaks the real protocol on real sockets but keeps everything in memory and does not isolate or fence transactions: nothing
on it survives the process, and the service runs at least once. The library gives its broker a port of its own choice, so a
forwarder on the configured port leads clients to it; they go on to the broker's own address, which it advertises.
Two members in one group do not work on it (one replica is all it is for).
"""

import asyncio
import contextlib
import ctypes
from collections.abc import Mapping
from pathlib import Path

import confluent_kafka
from aiokafka.admin import AIOKafkaAdminClient

from service.addresses import host_port
from service.errors import SetupError

_PRODUCER = 0
_ERROR_BYTES = 512
_COPY_BYTES = 65_536


async def embedded_cluster(admin: AIOKafkaAdminClient) -> bool:
    """Whether a cluster is such a broker, maybe of another process, by the id that the library gives it. Raises `KafkaError`."""
    cluster_id: str | None = (await admin.describe_cluster())["cluster_id"]
    return (cluster_id or "").startswith("mockCluster")


class EmbeddedBroker:
    """One in-memory broker for this process and its neighbours on this machine."""

    def __init__(self, *, port: int, host: str = "127.0.0.1") -> None:
        """`port` 0 takes any free one; `bootstrap` says which once it is started."""
        self._host, self._port = host, port
        self._library = _library()
        self._handle: int | None = None
        self._cluster: int | None = None
        self._broker: tuple[str, int] = ("", 0)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def bootstrap(self) -> str:
        """host:port for clients."""
        return host_port(self._host, self._port)

    async def start(self, topics: Mapping[str, int]) -> None:
        """Serves `topics` (name -> partitions). Raises `SetupError` when the port is taken."""
        self._open_cluster()
        for name, partitions in topics.items():
            code = self._library.rd_kafka_mock_topic_create(self._cluster, name.encode(), partitions, 1)
            if code != 0:
                self._close_cluster()
                raise SetupError(
                    f"the embedded broker refused the topic {name} (librdkafka error {code}); see kafka.topic_prefix"
                )
        try:
            self._server = await asyncio.start_server(self._serve, self._host, self._port)
        except OSError as error:
            self._close_cluster()
            raise SetupError(
                f"the embedded broker cannot listen on {self.bootstrap} ({error.strerror}); "
                "is one running already? set kafka.bootstrap_servers to another port",
                exit_code=3,
            ) from error
        self._port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Ends the broker and everything in it; idempotent."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            for task in tuple(self._connections):
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            await server.wait_closed()
        # Joins the library's threads: not on the loop's time.
        await asyncio.to_thread(self._close_cluster)

    def _open_cluster(self) -> None:
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        configuration = self._library.rd_kafka_conf_new()
        # Log level 0: the library would warn on standard error that its own (unused) client has no brokers.
        self._library.rd_kafka_conf_set(configuration, b"log_level", b"0", error, _ERROR_BYTES)
        self._handle = self._library.rd_kafka_new(_PRODUCER, configuration, error, _ERROR_BYTES)
        if not self._handle:
            raise SetupError(f"librdkafka could not start: {error.value.decode('utf-8', 'replace')}")
        self._cluster = self._library.rd_kafka_mock_cluster_new(self._handle, 1)
        if not self._cluster:
            self._close_cluster()
            raise SetupError("librdkafka could not start its in-process broker")
        address = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode("ascii")
        host, _, port = address.rpartition(":")
        self._broker = (host, int(port))
        self._library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)

    def _close_cluster(self) -> None:
        cluster, self._cluster = self._cluster, None
        handle, self._handle = self._handle, None
        if cluster:
            self._library.rd_kafka_mock_cluster_destroy(cluster)
        if handle:
            self._library.rd_kafka_destroy(handle)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(OSError):
                there_reader, there_writer = await asyncio.open_connection(*self._broker)
                await _forward(reader, writer, there_reader, there_writer)
        except asyncio.CancelledError:
            # Only `close` cancels; the stream's own callback would log the cancellation as an error.
            pass
        finally:
            writer.close()
            self._connections.discard(task)


async def _forward(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, there: asyncio.StreamReader, back: asyncio.StreamWriter
) -> None:
    """Copies both ways until either side ends."""
    copies = [asyncio.ensure_future(_copy(reader, back)), asyncio.ensure_future(_copy(there, writer))]
    try:
        await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for copy in copies:
            copy.cancel()
        await asyncio.gather(*copies, return_exceptions=True)
        back.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_COPY_BYTES):
        writer.write(data)
        await writer.drain()


def _library() -> ctypes.CDLL:
    """The librdkafka that the confluent-kafka wheel carries. Raises `SetupError` where there is none."""
    package = Path(confluent_kafka.__file__).parent
    for pattern in (
        "../confluent_kafka.libs/librdkafka-*.so*",
        ".dylibs/librdkafka*.dylib",
        "../confluent_kafka.libs/librdkafka*.dll",
    ):
        for path in sorted(package.glob(pattern)):
            return _declare(ctypes.CDLL(str(path)))
    raise SetupError(
        "this installation of confluent-kafka carries no librdkafka, so there is no embedded broker; "
        "set kafka.embedded = false and point kafka.bootstrap_servers at a broker"
    )


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    signatures: dict[str, tuple[object, list[object]]] = {
        "rd_kafka_conf_new": (pointer, []),
        "rd_kafka_conf_set": (number, [pointer, text, text, text, ctypes.c_size_t]),
        "rd_kafka_new": (pointer, [number, pointer, text, ctypes.c_size_t]),
        "rd_kafka_destroy": (None, [pointer]),
        "rd_kafka_mock_cluster_new": (pointer, [pointer, number]),
        "rd_kafka_mock_cluster_destroy": (None, [pointer]),
        "rd_kafka_mock_cluster_bootstraps": (text, [pointer]),
        "rd_kafka_mock_topic_create": (number, [pointer, text, number, number]),
        "rd_kafka_mock_group_initial_rebalance_delay_ms": (None, [pointer, ctypes.c_int32]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
