"""Health and metrics over HTTP on a port of their own: /livez, /readyz, /metrics.

Guarantees: /livez is 200 unless the process should be replaced, /readyz is 200 only while requests are taken; both say why in
JSON. Runs in the caller's event loop and leaves signals alone. Read-only and without authentication: bind it where only the
orchestrator and Prometheus reach it.
"""

import asyncio
import contextlib
import socket
from collections.abc import Generator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from service.addresses import cannot_listen, listener
from service.config import AdminSection
from service.health import Health
from service.telemetry.metrics import Metrics

_MAX_CONNECTIONS = 64
_KEEP_ALIVE_S = 5


def admin_app(health: Health, metrics: Metrics) -> Starlette:
    """The ASGI application, for the server below and for tests."""

    async def livez(_: Request) -> Response:
        report = health.report()
        return JSONResponse(report.as_json(), status_code=200 if report.live else 503)

    async def readyz(_: Request) -> Response:
        report = health.report()
        return JSONResponse(report.as_json(), status_code=200 if report.ready else 503)

    async def show_metrics(request: Request) -> Response:
        body, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    return Starlette(routes=[Route("/livez", livez), Route("/readyz", readyz), Route("/metrics", show_metrics)])


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        # Signals belong to app.py, which drains; uvicorn would take SIGTERM for itself.
        yield


class AdminServer:
    """Serves `admin_app` between `start` and `stop`."""

    def __init__(self, section: AdminSection, health: Health, metrics: Metrics) -> None:
        self._section = section
        self._server = _Server(
            uvicorn.Config(
                admin_app(health, metrics),
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                limit_concurrency=_MAX_CONNECTIONS,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=1,
            )
        )
        self._running: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self) -> int:
        """Binds and serves; the port (chosen when the setting is 0). Raises `SetupError` naming the setting."""
        bound = self._bind()
        self.port = bound.getsockname()[1]
        self._running = asyncio.create_task(self._server.serve([bound]), name="admin-server")
        return self.port

    def _bind(self) -> socket.socket:
        host, port = self._section.host, self._section.port
        try:
            return listener(host, port)
        except OSError as error:
            raise cannot_listen("admin", host, port, error) from error

    async def stop(self) -> None:
        """Ends within about a second; idempotent."""
        running, self._running = self._running, None
        if running is None:
            return
        self._server.should_exit = True
        await running
