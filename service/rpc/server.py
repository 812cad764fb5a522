"""The gRPC server: limits and keepalive said out loud, health with Watch, reflection; started and stopped by `app.py`.

Guarantees: `start` returns bound and serving, or raises `SetupError` that names the setting; health says SERVING only while
requests are taken; `stop` lets calls finish for the grace, then hands open streams over, and returns soon after.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service.addresses import host_port
from service.config import GrpcSection
from service.errors import SetupError
from service.health import Health, HealthReport
from service.rpc.servicer import Inference
from service.telemetry import names

_KEEPALIVE_TIMEOUT_MS = 10_000
_MIN_CLIENT_PING_MS = 5_000
_MAX_IDLE_MS = 300_000
_WRITE_BUFFER_BYTES = 65_536
_MAX_CALLS = 4_096
_LAST_WORDS_S = 1.0
_CLOSE_S = 0.2

_SERVICES = ("", names.RPC_SERVICE)


def options(section: GrpcSection) -> list[tuple[str, int]]:
    """Channel arguments of the server."""
    return [
        # Two servers on one port would share its calls in silence; the second is to fail instead.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", section.max_message_bytes),
        ("grpc.max_send_message_length", section.max_message_bytes),
        ("grpc.keepalive_time_ms", int(section.keepalive_s * 1e3)),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _MIN_CLIENT_PING_MS),
        # A connection ages only while idle: a long generation must not be cut by a timer.
        ("grpc.max_connection_idle_ms", _MAX_IDLE_MS),
        ("grpc.http2.write_buffer_size", _WRITE_BUFFER_BYTES),
    ]


class RpcServer:
    """Serves `Inference` between `start` and `stop`, in the caller's event loop."""

    def __init__(self, section: GrpcSection, inference: Inference, report: Health) -> None:
        self._section = section
        self._inference = inference
        self._report = report
        self._server = grpc.aio.server(options=options(section), maximum_concurrent_rpcs=_MAX_CALLS)
        self._health = health.aio.HealthServicer()
        self._changed = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._unwatch: Callable[[], None] | None = None
        self.port = 0

    async def start(self) -> int:
        """Binds and serves; the port (chosen when the setting is 0). Raises `SetupError` naming the setting."""
        self._server.add_generic_rpc_handlers((self._inference.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((names.RPC_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        host, port = self._section.host, self._section.port
        try:
            self.port = self._server.add_insecure_port(host_port(host, port))
        except RuntimeError as error:
            raise SetupError(
                f"cannot listen on grpc.host:grpc.port {host_port(host, port)}; set another grpc.port (0 takes any free one), "
                "or stop what uses it"
            ) from error
        await self._follow_once()
        await self._server.start()
        self._unwatch = self._report.watch(self._note)
        self._following = asyncio.create_task(self._follow(), name="rpc-health")
        return self.port

    async def stop(self, grace_s: float) -> None:
        """Takes no new call; running ones and what is detached may finish for `grace_s`; then streams are handed over. Idempotent."""
        await self._health.enter_graceful_shutdown()
        following, self._following = self._following, None
        if following is not None:
            following.cancel()
            await asyncio.wait({following})
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None
        self._inference.drain()
        # Not server.stop(grace): an open health Watch would hold it for all of the grace.
        await _within(grace_s, self._inference.done())
        self._inference.hand_over()
        await _within(_LAST_WORDS_S, self._inference.idle())
        await self._server.stop(_CLOSE_S)
        await self._inference.close()

    def _note(self, _: HealthReport) -> None:
        self._changed.set()

    async def _follow(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._follow_once()

    async def _follow_once(self) -> None:
        ready = self._report.report().ready
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in _SERVICES:
            await self._health.set(service, status)


async def _within(timeout_s: float, what: Awaitable[None]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await what
