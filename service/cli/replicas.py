"""What the commands that speak gRPC share: which replicas, and what a person is told when one cannot do it."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Annotated, Any, TypeVar

import typer

from service.addresses import fault_of, host_port
from service.cli.options import utf8
from service.config import Settings
from service.errors import SetupError
from service.rpc.client_errors import SluiceError

T = TypeVar("T")

Target = Annotated[
    str,
    typer.Option(
        "--target",
        "-t",
        help="host:port of a replica, or several with commas between; default: grpc.host:grpc.port.",
        show_default=False,
    ),
]
RequestId = Annotated[str, typer.Argument(metavar="ID", callback=utf8, help="A request id: topic-partition-offset.")]


def targets(settings: Settings, target: str) -> tuple[str, ...]:
    """The replicas to ask. Raises `SetupError` for an option that names none."""
    named = tuple(part.strip() for part in target.split(",") if part.strip())
    if target and not named:
        raise SetupError("--target: name at least one host:port")
    for address in named:
        # Others are gRPC's own names, as unix:/path or dns:///host:port.
        if not address.startswith(("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:")) and (fault := fault_of(address)):
            raise SetupError(f"--target {fault}")
    return named or (host_port(settings.grpc.host, settings.grpc.port),)


def speak(replicas: Sequence[str], work: Coroutine[Any, Any, T]) -> T:
    """Runs `work`. What ends it becomes a `SetupError` that says what to do."""
    try:
        return asyncio.run(work)
    except SluiceError as error:
        unreachable = error.code == "unavailable"
        where = " or ".join(replicas)
        hint = f"; is a replica running at {where}? `make serve` starts one" if unreachable else ""
        if error.code == "unimplemented":
            hint = f"; start {where} with Kafka, or ask a replica that has it"
        code = 3 if error.code in ("unavailable", "broker_unavailable") else 2 if error.code == "invalid_field" else 1
        raise SetupError(f"{error}{hint}", exit_code=code) from error
