"""`sluice generate`: one prompt, offline; the engine and the use case without a server."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from opentelemetry.context import Context

from service.app import Core
from service.cli import output, prompts
from service.cli.options import ConfigFile, Json, Overrides, Quantize, settings_from
from service.cli.serve import loading, resolve_model
from service.config import Settings
from service.contract import Call, Delta, Failed, Finished, PromptRequest
from service.errors import RequestError
from service.generation import new_request_id
from service.telemetry import logging


def generate(
    text: prompts.Text,
    raw: prompts.Raw = False,
    system: prompts.System = "",
    max_tokens: prompts.MaxTokens = 256,
    temperature: prompts.Temperature = 0.0,
    top_p: prompts.TopP = None,
    seed: prompts.Seed = None,
    stop: prompts.Stop = None,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="Print token ids, not text.")] = False,
    model: Annotated[str | None, typer.Option("--model", help="A model directory (model.path).", show_default=False)] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.", show_default=False)
    ] = None,
    quantize: Quantize = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Answer one prompt here and now, without a server. Greedy unless --temperature says otherwise."""
    settings = settings_from(config, overrides, {"model": {"path": model, "dtype": dtype}, "engine": {"quantize": quantize}})
    request = prompts.prompt_request(
        text, raw=raw, system=system, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop
    )
    logging.configure(settings.logging, quiet=True)
    uvloop.run(_generate(settings, resolve_model(settings), request, token_ids, as_json))


async def _generate(settings: Settings, model_dir: Path, request: PromptRequest, token_ids: bool, as_json: bool) -> None:
    core = Core(settings, model_dir)
    try:
        await loading(core, core.start)
        call = Call(request_id=new_request_id(), transport="cli", parent=Context())
        async with await core.generation.start(request, call) as events:
            async for event in events:
                if isinstance(event, Delta) and not as_json:
                    output.write("".join(f"{i} " for i in event.token_ids) if token_ids else event.text)
                elif isinstance(event, Finished | Failed):
                    _end(event, as_json)
    finally:
        await asyncio.shield(core.stop())


def _end(event: Finished | Failed, as_json: bool) -> None:
    if isinstance(event, Failed):
        raise RequestError(event.error.code, event.error.message, field=event.error.field)
    if not as_json:
        output.write("\n")
        return
    choice, usage, timings = event.choices[0], event.usage, event.timings
    output.print_json(
        {
            "text": choice.text,
            "token_ids": list(choice.token_ids),
            "finish_reason": choice.finish_reason,
            "seed": event.seed,
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "cached_prompt_tokens": usage.cached_prompt_tokens,
                "completion_tokens": usage.completion_tokens,
            },
            "timings": {
                "queue_ms": round(timings.queue_ms, 2),
                "ttft_ms": round(timings.ttft_ms, 2),
                "tpot_ms": round(timings.tpot_ms, 2),
                "total_ms": round(timings.total_ms, 2),
            },
        }
    )
