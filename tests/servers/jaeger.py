"""A real Jaeger 1.76 (all-in-one) for tests: built once with Go into the cache, started on free ports, stopped by its own process.

The main package sits in a module with `replace` directives, which `go install` refuses: a module of our own requires it and
builds it. Checksums stay verified: the module's own hash is pinned here, and its go.sum vouches for what it depends on.
`SLUICE_TEST_JAEGER=otlp_host:port,http_host:port` names one that runs already (OTLP gRPC, query API).
"""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from service.config import cache_dir
from tests.servers.kafka import free_port
from tests.servers.tied import tie

VERSION = "1.76.0"
MODULE = "github.com/jaegertracing/jaeger"
ENVIRONMENT = "SLUICE_TEST_JAEGER"
BUILD_TIMEOUT_S = 1200
START_TIMEOUT_S = 60
POLL_S = 0.05

_PINNED_SUM = f"""{MODULE} v{VERSION} h1:sWCOOF1dr+NL0PLil7mFo3BqqQL8k4WiM7aguFbc14g=
{MODULE} v{VERSION}/go.mod h1:hqcuJlLDTv7G2x5eFd/BhwcPdLxj3N+90aKhIzdOcKo=
"""
_GO_MOD = f"""module sluice.test/jaeger

go 1.24.6

require {MODULE} v{VERSION}

replace github.com/Shopify/sarama => github.com/Shopify/sarama v1.33.0
"""
_TOOLS_GO = f"""//go:build tools

package tools

import _ "{MODULE}/cmd/all-in-one"
"""

Span = dict[str, Any]
"""A span as Jaeger's query API gives it: operationName, references, tags, startTime and duration (microseconds), logs."""


class ServerError(RuntimeError):
    """The server cannot be built, started or asked; one line that says what to do."""


@dataclass(frozen=True, slots=True)
class JaegerServer:
    """Where a running Jaeger listens: `otlp_endpoint` host:port (gRPC, plain text), `query_url` the base of its HTTP API."""

    otlp_endpoint: str
    query_url: str

    def fetch_trace(self, trace_id: str, *, until: Callable[[list[Span]], bool] = bool, timeout_s: float = 20.0) -> list[Span]:
        """The spans of a trace, as the query API gives them, once `until(spans)` holds (default: any span is there).

        `trace_id`: 32 hexadecimal digits. Raises `ServerError` after `timeout_s` with the names of the spans seen so far.
        """
        deadline = time.monotonic() + timeout_s
        spans: list[Span] = []
        while True:
            try:
                data = self.query(f"/api/traces/{trace_id}")
            except HTTPError as error:
                error.close()
                if error.code != 404:
                    raise
                data = []
            spans = [span for trace in data or [] for span in trace["spans"]]
            if until(spans):
                return spans
            if time.monotonic() > deadline:
                names = sorted(span["operationName"] for span in spans)
                raise ServerError(f"trace {trace_id} was not complete in Jaeger after {timeout_s:g} s; seen: {names}")
            time.sleep(POLL_S)

    def query(self, path: str) -> Any:
        """`data` of the query API's answer to GET `path`."""
        with urlopen(self.query_url + path, timeout=10) as response:
            return json.load(response)["data"]


def tags(span: Span) -> dict[str, Any]:
    """A span's attributes."""
    return {tag["key"]: tag["value"] for tag in span["tags"]}


def parent_of(span: Span) -> str | None:
    """The span id of the parent, None for a root. Links are FOLLOWS_FROM references and no parents."""
    return next((ref["spanID"] for ref in span["references"] if ref["refType"] == "CHILD_OF"), None)


def binary() -> Path:
    """The Jaeger executable in the cache, built first where it is missing (about 3 minutes on two cores)."""
    directory = cache_dir() / "servers" / f"jaeger-{VERSION}"
    target = directory / "jaeger"
    if target.exists():
        return target
    go = shutil.which("go")
    if go is None:
        raise ServerError(
            f"tests that read traces need Jaeger: install Go >= 1.24.6 (it is built once), or set {ENVIRONMENT}=otlp:port,query:port"
        )
    directory.mkdir(parents=True, exist_ok=True)
    # Two test runs on one machine build once: the second waits for the first.
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _build(go, target)
    return target


def _build(go: str, target: Path) -> None:
    print(f"building Jaeger {VERSION} with Go, once (about 3 minutes) …", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="sluice-jaeger-") as name:
        source = Path(name)
        (source / "go.mod").write_text(_GO_MOD)
        (source / "go.sum").write_text(_PINNED_SUM)
        (source / "tools.go").write_text(_TOOLS_GO)
        module = json.loads(_go(go, source, "mod", "download", "-json", f"{MODULE}@v{VERSION}"))
        _check_hash(module)
        sums = {*_PINNED_SUM.splitlines(), *(Path(module["Dir"]) / "go.sum").read_text().splitlines()}
        (source / "go.sum").write_text("\n".join(sorted(sums)) + "\n")
        built = target.with_name("jaeger.new")
        _go(go, source, "build", "-mod=mod", "-trimpath", "-ldflags=-s -w", "-o", str(built), f"{MODULE}/cmd/all-in-one")
        built.rename(target)


def _check_hash(module: dict[str, str]) -> None:
    if f"{MODULE} v{VERSION} {module['Sum']}" not in _PINNED_SUM:
        raise ServerError(f"the source of Jaeger {VERSION} has hash {module['Sum']}, not the pinned one; nothing was built")


def _go(go: str, directory: Path, *arguments: str) -> str:
    environment = {**os.environ, "GOFLAGS": "-buildvcs=false", "CGO_ENABLED": "0"}
    done = subprocess.run(
        [go, *arguments], cwd=directory, env=environment, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise ServerError(f"building Jaeger: `go {arguments[0]}` ended with {done.returncode}: {last}")
    return done.stdout


@contextmanager
def running() -> Iterator[JaegerServer]:
    """A Jaeger that answers; the one that SLUICE_TEST_JAEGER names, else an own one that ends with the block."""
    named = os.environ.get(ENVIRONMENT, "")
    if named:
        otlp, separator, query = named.partition(",")
        if not separator:
            raise ServerError(f"{ENVIRONMENT}={named}: give the OTLP gRPC and the query address as host:port,host:port")
        yield JaegerServer(otlp, f"http://{query}")
        return
    executable = binary()
    otlp_port, query_port, *others = (free_port() for _ in range(7))
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(_command(executable, otlp_port, query_port, others), stdout=log, stderr=subprocess.STDOUT)
        tie(process.pid)
        server = JaegerServer(f"127.0.0.1:{otlp_port}", f"http://127.0.0.1:{query_port}")
        try:
            _wait_ready(process, server, log)
            yield server
        finally:
            _stop(process)


def _command(executable: Path, otlp_port: int, query_port: int, others: list[int]) -> list[str]:
    flags = {
        "collector.otlp.enabled": "true",
        "collector.otlp.grpc.host-port": f"127.0.0.1:{otlp_port}",
        "collector.otlp.http.host-port": f"127.0.0.1:{others[0]}",
        "query.http-server.host-port": f"127.0.0.1:{query_port}",
        "query.grpc-server.host-port": f"127.0.0.1:{others[1]}",
        "collector.grpc-server.host-port": f"127.0.0.1:{others[2]}",
        "collector.http-server.host-port": f"127.0.0.1:{others[3]}",
        "admin.http.host-port": f"127.0.0.1:{others[4]}",
    }
    return [str(executable), *(f"--{name}={value}" for name, value in flags.items())]


def _wait_ready(process: subprocess.Popen[bytes], server: JaegerServer, log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    host, port = server.otlp_endpoint.split(":")
    while process.poll() is None and time.monotonic() < deadline:
        try:
            server.query("/api/services")
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except (URLError, OSError):
            time.sleep(POLL_S)
    log.seek(0)
    tail = "\n".join(log.read().decode(errors="replace").splitlines()[-10:])
    how = f"did not answer within {START_TIMEOUT_S} s" if process.poll() is None else f"ended with {process.poll()}"
    raise ServerError(f"Jaeger {how}; its last words:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    # What it holds is in memory only: there is nothing to wait for.
    process.terminate()
    try:
        process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    with running() as jaeger:
        print(f"OTLP {jaeger.otlp_endpoint}   query {jaeger.query_url}   (Ctrl-C ends it)", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            pass
