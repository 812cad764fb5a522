"""`sluice stream`: one prompt to a running replica over gRPC; its tokens as they come."""

from collections.abc import Sequence
from typing import Annotated

import typer

from service.cli import output, prompts
from service.cli.options import Common, grouped
from service.cli.replicas import Target, speak, targets
from service.contract import Delta, Finished, PromptRequest, Reset
from service.rpc.client import SluiceClient, StreamItem


@grouped
def stream(
    text: prompts.Text,
    asked: prompts.PromptOptions,
    common: Common,
    target: Target = "",
    model: Annotated[
        str, typer.Option("--model", help="The model's name; empty: the one that is served.", show_default=False)
    ] = "",
) -> None:
    """Stream one answer. When the replica dies or restarts the stream goes on where it stopped."""
    replicas = targets(common.settings(), target)
    request = asked.request(text, model=model)
    speak(replicas, _stream(replicas, request, common.as_json))


async def _stream(replicas: Sequence[str], request: PromptRequest, as_json: bool) -> None:
    async with SluiceClient(replicas) as client:
        # A stream outlasts a replica that restarts; where none was ever there a person should not wait for one.
        await client.health()
        async with client.stream(request) as events:
            async for event in events:
                show(event, as_json)


def show(event: StreamItem, as_json: bool) -> None:
    """One event of a stream, as a person or a program reads it."""
    if isinstance(event, Finished):
        _end(event, as_json)
    elif isinstance(event, Delta) and not as_json:
        output.write(event.text)
    elif isinstance(event, Delta):
        output.print_json({"seq": event.seq, "token_ids": list(event.token_ids), "text": event.text})
    elif isinstance(event, Reset):
        _voided(event, as_json)
    elif as_json:
        output.print_json({"started": {"request_id": event.request_id, "seed": event.seed, "trace_id": event.trace_id}})


def _voided(event: Reset, as_json: bool) -> None:
    if as_json:
        output.print_json({"reset": {"epoch": event.epoch, "resume_from": list(event.resume_from)}})
    else:
        output.err.print(f"\n[yellow]a new owner says other tokens from {list(event.resume_from)} on[/]")


def _end(event: Finished, as_json: bool) -> None:
    usage, timings = event.usage, event.timings
    if as_json:
        output.print_json(
            {
                "finished": {
                    "finish_reason": event.choices[0].finish_reason,
                    "prompt_tokens": usage.prompt_tokens,
                    "completion_tokens": usage.completion_tokens,
                    "ttft_ms": round(timings.ttft_ms, 2),
                    "total_ms": round(timings.total_ms, 2),
                    "trace_id": event.trace_id,
                }
            }
        )
        return
    output.write("\n")
    trace = f", trace {event.trace_id}" if event.trace_id else ""
    output.err.print(
        f"[dim]{usage.completion_tokens} tokens, {usage.prompt_tokens} prompt ({usage.cached_prompt_tokens} cached), "
        f"TTFT {timings.ttft_ms:.0f} ms, {timings.total_ms:.0f} ms{trace}[/]"
    )
