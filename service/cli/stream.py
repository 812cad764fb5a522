"""`sluice stream`: one prompt to a running replica over gRPC; its tokens as they come."""

from collections.abc import AsyncIterable, Sequence
from typing import Annotated

import typer

from service.cli import output, prompts
from service.cli.options import Common, grouped
from service.cli.replicas import Target, speak, targets
from service.contract import Delta, Finished, PromptRequest, Reset
from service.rpc.client import SluiceClient, StreamItem
from service.rpc.client_errors import SluiceError


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
            await show(events, as_json)


async def show(events: AsyncIterable[StreamItem], as_json: bool) -> None:
    """A stream's events as they come. A failure is then told on a line of its own, below the text. Raises `SluiceError`."""
    inside_text = False
    try:
        async for event in events:
            _show_one(event, as_json)
            inside_text = isinstance(event, Delta) and not as_json
    except SluiceError:
        if inside_text:
            output.write("\n")
        raise


def _show_one(event: StreamItem, as_json: bool) -> None:
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
