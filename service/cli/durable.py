"""`sluice submit`, `attach`, `get` and `cancel`: durable requests over gRPC, on any replica of a group."""

import asyncio
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.markup import escape

from service.cli import output, prompts
from service.cli.options import Common, grouped, utf8
from service.cli.replicas import RequestId, Target, speak, targets
from service.cli.results import as_document, show_result
from service.cli.stream import show
from service.contract import PromptRequest
from service.rpc.client import CallOptions, SluiceClient
from service.wire_limits import UINT32_MAX

_POLL_S = 0.5


@grouped
def submit(
    text: prompts.Text,
    asked: prompts.PromptOptions,
    common: Common,
    target: Target = "",
    key: Annotated[
        str,
        typer.Option(
            "--key",
            callback=utf8,
            help="The record's key; default: the label, else the prompt's beginning.",
            show_default=False,
        ),
    ] = "",
    queue_class: prompts.ClassName = "",
    idempotency_key: Annotated[
        str, typer.Option("--idempotency-key", help="Prompts of one key are one prompt.", show_default=False)
    ] = "",
    follow: Annotated[bool, typer.Option("--attach", "-a", help="Then show the tokens as they come.")] = False,
) -> None:
    """Hand a prompt over for good: prints its request id once it is written to Kafka."""
    replicas = targets(common.settings(), target)
    request = asked.request(text)
    speak(
        replicas,
        _submit(replicas, request, key, queue_class, CallOptions(idempotency_key=idempotency_key), follow, common.as_json),
    )


@grouped
def attach(
    request_id: RequestId,
    common: Common,
    after_seq: Annotated[
        list[int] | None,
        typer.Option(
            "--after-seq", min=0, max=UINT32_MAX, help="Tokens read before; repeat it, one number a choice.", show_default=False
        ),
    ] = None,
    target: Target = "",
) -> None:
    """Read a durable request's tokens, live or past. Leaving ends the reading, not the request."""
    replicas = targets(common.settings(), target)
    speak(replicas, _attach(replicas, request_id, after_seq or (), common.as_json))


@grouped
def get(
    request_id: RequestId,
    common: Common,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait until it has ended.")] = False,
    target: Target = "",
) -> None:
    """Show a durable request's result; exit 1 when it failed, was cancelled, or has not ended yet."""
    replicas = targets(common.settings(), target)
    value = speak(replicas, _get(replicas, request_id, wait))
    show_result(value, common.as_json)
    if value["status"] != "finished":
        raise typer.Exit(1)


@grouped
def cancel(
    request_id: Annotated[str, typer.Argument(metavar="ID", callback=utf8, help="A request id.")],
    common: Common,
    target: Target = "",
) -> None:
    """End a running or waiting request, wherever it is; once more does no harm."""
    replicas = targets(common.settings(), target)
    was_running = speak(replicas, _cancel(replicas, request_id))
    if common.as_json:
        output.print_json({"request_id": request_id, "was_running": was_running})
    else:
        said = "is being cancelled" if was_running else "had ended, or is not known there"
        output.out.print(f"[bold]{escape(request_id)}[/] {said}")


async def _submit(
    replicas: Sequence[str],
    request: PromptRequest,
    key: str,
    queue_class: str,
    options: CallOptions,
    follow: bool,
    as_json: bool,
) -> None:
    async with SluiceClient(replicas) as client:
        request_id = await client.submit(request, key=key, queue_class=queue_class, options=options)
    if as_json:
        output.print_json({"request_id": request_id})
    else:
        output.out.print(f"[bold]{escape(request_id)}[/]")
    if follow:
        await _attach(replicas, request_id, (), as_json)


async def _attach(replicas: Sequence[str], request_id: str, after: Sequence[int], as_json: bool) -> None:
    async with SluiceClient(replicas) as client:
        # A reader outlasts a replica that restarts; where none was ever there a person should not wait for one.
        await client.health()
        async with client.attach(request_id, after) as events:
            try:
                await show(events, as_json)
            except asyncio.CancelledError:
                read = " ".join(f"--after-seq {count}" for count in events.counts if count)
                output.err.print(f"\nit goes on: [bold]sluice attach {escape(request_id)} {read}[/]")
                raise


async def _get(replicas: Sequence[str], request_id: str, wait: bool) -> dict[str, object]:
    async with SluiceClient(replicas) as client:
        while True:
            value = as_document(await client.get(request_id))
            if value["status"] != "pending" or not wait:
                return value
            await asyncio.sleep(_POLL_S)


async def _cancel(replicas: Sequence[str], request_id: str) -> bool:
    async with SluiceClient(replicas) as client:
        return await client.cancel(request_id)
