"""`sluice doctor`: what this machine and configuration can serve, and what stands in the way."""

import asyncio
import contextlib
import errno
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import msgspec
import typer
from aiokafka.errors import KafkaError
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from rich.markup import escape
from rich.table import Table

from service.addresses import cannot_listen, host_port, listener, split
from service.cli import output
from service.cli.demo_model import NAME as DEMO_MODEL
from service.cli.options import ConfigFile, Json, Overrides, settings_from
from service.config import EngineSection, KafkaSection, Settings, cache_dir
from service.errors import SetupError
from service.kafka.clients import Clients
from service.kafka.connection import Connection
from service.kafka.delivery import choose
from service.kafka.topics import Topics
from service.tokenization import Tokenization

State = Literal["ok", "note", "fail"]
BROKER_TIMEOUT_S = 5.0
RELEASED_S = 1_793_000_000  # autumn 2026: no clock that is right shows less
MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "fail": "[red]fail[/]"}


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `exit_code` counts when `state` is fail."""

    name: str
    state: State
    detail: str
    exit_code: int = 2


def doctor(config: ConfigFile = None, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check the machine, the model directory, the broker, the ports and the trace collector."""
    settings = settings_from(config, overrides)
    checks = [
        _software(),
        _machine(),
        *_engine(settings),
        _kafka(settings.kafka),
        _delivery(settings.kafka),
        _ports(settings),
        _tracing(settings.tracing.otlp_endpoint),
        _clock(),
    ]
    if as_json:
        output.print_json({"checks": [asdict(check) for check in checks]})
    else:
        table = Table(box=None, show_header=False, padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for check in checks:
            table.add_row(MARKS[check.state], check.name, escape(check.detail))
        output.out.print(table)
    failed = [check.exit_code for check in checks if check.state == "fail"]
    if failed:
        raise typer.Exit(max(failed))


def _software() -> Check:
    names = ("torch", "triton", "transformers", "aiokafka", "grpcio")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return Check("software", "ok", f"sluice {version('sluice')}, Python {platform.python_version()}, {versions}")


def _machine() -> Check:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    disk = shutil.disk_usage(_existing(cache_dir())).free / 2**30
    state: State = "note" if memory < 4 or disk < 2 else "ok"
    return Check(
        "machine", state, f"{cores} cores this process may use, {memory:.1f} GiB memory, {disk:.0f} GiB free for {cache_dir()}"
    )


def _engine(settings: Settings) -> tuple[Check, Check]:
    """What would compute, and the model."""
    path = settings.model.path
    directory = Path(path).expanduser() if path else cache_dir() / "models" / DEMO_MODEL
    # Asked of a child, so that this process stays small and a broken torch is one line and not a traceback.
    config = msgspec.json.encode(settings.engine_config(str(directory))).decode()
    found: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            [sys.executable, "-m", "engine.compute_path", config], stdout=subprocess.PIPE, stderr=said, text=True
        ) as child,
    ):
        for line in child.stdout or ():
            found = json.loads(line)
            if "doing" in found:
                output.err.print(f"{found['doing']} …")
        code = child.wait()
        said.seek(0)
        lines = said.read().strip().splitlines()
    if code == 0:
        return _compute(settings.engine, found), _model(settings, directory, found["model_fault"])
    why = lines[-1] if lines else f"the engine's Python ended with {code}"
    return Check("compute", "fail", why, 2 if code == 2 else 3), _model(settings, directory, "")


def _compute(engine: EngineSection, found: dict[str, Any]) -> Check:
    if not found["on_cpu"]:
        return Check("compute", "ok", f"{found['device']}: {found['reason']}")
    waiting = ", ".join(f"{name}={value}" for name, value in found["waiting"].items())
    state: State = "note" if found["operators"] == "reference" else "ok"
    pinned = ", pinned" if engine.pin_threads else ""
    return Check("compute", state, f"{found['reason']}; {found['threads']} threads{pinned}; {waiting}")


def _model(settings: Settings, directory: Path, fault: str) -> Check:
    """`fault`: why the engine would not load it."""
    if not settings.model.path and not directory.is_dir():
        return Check(
            "model", "note", f"model.path is not set and {DEMO_MODEL} is not there yet: the first run fetches it (93 MB)"
        )
    if not (directory / "config.json").is_file():
        return Check(
            "model", "fail", f"{directory} holds no config.json; name a Hugging Face directory, or `sluice model import` one"
        )
    if not any(directory.glob("*.safetensors")) and settings.model.load_format != "dummy":
        return Check("model", "fail", f"{directory} holds no *.safetensors")
    if fault:
        return Check("model", "fail", fault)
    try:
        Tokenization(directory)
    except SetupError as error:
        return Check("model", "fail", str(error))
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 2**20
    return Check("model", "ok", f"{directory.name}: {size:,.0f} MiB of weights, tokenizer reads")


def _kafka(kafka: KafkaSection) -> Check:
    if not kafka.enabled:
        return Check("kafka", "note", "kafka.enabled is false: gRPC alone")
    if kafka.embedded:
        return Check("kafka", "note", "embedded broker: in memory, at least once, not durable; for a first try")
    try:
        connection = Connection(kafka)
    except SetupError as error:
        return Check("kafka", "fail", str(error))
    if why := asyncio.run(connection.explain()):
        return Check("kafka", "fail", f"{why}; see kafka.bootstrap_servers (`make serve` brings a broker)", 3)
    try:
        admin = AdminClient({**connection.librdkafka(), "socket.timeout.ms": int(BROKER_TIMEOUT_S * 1000)})
        # A token is asked for in a callback, which only `poll` runs.
        admin.poll(0)
        cluster = admin.list_topics(timeout=BROKER_TIMEOUT_S)
    except KafkaException as error:
        return Check("kafka", "fail", f"{kafka.bootstrap_servers} does not tell its topics: {error.args[0].str()}", 3)
    ours = [name for name in cluster.topics if name.startswith(kafka.topic_prefix)]
    missing = "" if kafka.topic_prefix + "prompts" in ours else "; no prompts topic yet: `sluice topics create`"
    return Check(
        "kafka",
        "note" if missing else "ok",
        f"{len(cluster.brokers)} broker(s) at {kafka.bootstrap_servers}, {len(ours)} topics of ours{missing}, {kafka.security_protocol}",
    )


def _delivery(section: KafkaSection) -> Check:
    """Tries the broker as the service does at its start."""
    if not section.enabled:
        return Check("delivery", "note", "kafka.enabled is false")
    topics = Topics(section.topic_prefix)
    try:
        connection = Connection(section)
        if not section.embedded and section.delivery != "at_least_once":
            admin = AdminClient(connection.librdkafka())
            # A token is asked for in a callback, which only `poll` runs.
            admin.poll(0)
            # Looked for among all: a broker that creates topics by itself would make one that is asked for.
            if topics.dead_letters not in admin.list_topics(timeout=BROKER_TIMEOUT_S).topics:
                return Check("delivery", "note", "not tried before the topics exist (`sluice topics create`)")
        delivery = asyncio.run(choose(section, Clients(section, connection.aiokafka), topics))
    except KafkaException:
        return Check("delivery", "note", "not tried: the broker does not answer, see kafka")
    except (SetupError, KafkaError, TimeoutError) as error:
        return Check("delivery", "fail", f"cannot be tried: {error or type(error).__name__}", 3)
    mode = delivery.mode.replace("_", " ")
    if delivery.mode == "exactly_once":
        return Check("delivery", "ok", f"{mode}: the broker fences producers and hides aborted records")
    return Check("delivery", "note", f"{mode}: {delivery.reason}")


def _clock() -> Check:
    # Deadlines travel as wall-clock times: a clock that is far off would expire prompts that are fresh.
    now = time.time()
    if now < RELEASED_S:
        return Check("clock", "fail", "the wall clock stands before this version was made; deadlines would be wrong")
    return Check("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)))


def _ports(settings: Settings) -> Check:
    wanted = {"grpc": (settings.grpc.host, settings.grpc.port), "admin": (settings.admin.host, settings.admin.port)}
    used = []
    with contextlib.ExitStack() as held:
        for name, (host, port) in wanted.items():
            try:
                held.enter_context(listener(host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    return Check("ports", "fail", str(cannot_listen(name, host, port, error)))
                used.append(name)
    if used == ["admin"] and settings.grpc.port == settings.admin.port:
        return Check("ports", "fail", f"grpc.port and admin.port are both {settings.grpc.port}; set another admin.port")
    if used:
        names = ", ".join(f"{name}.port {wanted[name][1]}" for name in used)
        return Check("ports", "note", f"in use: {names} (is Sluice running already?)")
    return Check(
        "ports", "ok", ", ".join(f"{name} {host_port(host, port)}" for name, (host, port) in wanted.items()) + " are free"
    )


def _tracing(endpoint: str) -> Check:
    if not endpoint:
        return Check("tracing", "note", "tracing.otlp_endpoint is empty: no spans")
    try:
        socket.create_connection(split(endpoint.removeprefix("http://").removeprefix("https://")), timeout=3).close()
    except (OSError, UnicodeError) as error:
        return Check("tracing", "fail", f"nothing listens at tracing.otlp_endpoint {endpoint} ({error})", 3)
    return Check("tracing", "ok", f"a collector listens at {endpoint}")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
