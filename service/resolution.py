"""From what a caller asked to what the engine is asked: checks, defaults, limits. Every refusal names the field and what to do.

Absent sampling fields come from generation_config.json, then from the defaults of `SamplingParams`. Knows no engine process, no time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine import EngineFacts, InvalidFieldError, Request, SamplingParams
from service.contract import Call, PromptRequest, SamplingFields
from service.errors import RequestError
from service.tokenization import Tokenization

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256

_PLAIN = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "logprobs",
    "n",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one replica takes. `max_tokens_cap` bounds max_tokens of requests that name none; `max_prompt_bytes` is of text."""

    model: str
    max_tokens_cap: int
    max_prompt_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A request that the engine can serve, and the stop strings that stay here. `cost_tokens`: what it may hold at most."""

    request: Request
    stop: tuple[str, ...]
    cost_tokens: int


def check_model(name: str, limits: Limits) -> None:
    """Raises `RequestError` (`unknown_model`); an empty name is the model that is served."""
    if name and name != limits.model:
        raise RequestError("unknown_model", f"this replica serves {limits.model}", field="model")


async def encode_prompt(
    prompt: PromptRequest, tokenization: Tokenization, facts: EngineFacts, limits: Limits
) -> tuple[int, ...]:
    """The prompt's ids, at least one. Raises `RequestError`."""
    given = [name for name, value in _inputs(prompt).items() if value is not None]
    if len(given) != 1:
        raise RequestError("invalid_field", "exactly one of prompt, messages and token_ids must be set", field="prompt")
    if prompt.token_ids is not None:
        if not all(0 <= token_id < facts.vocab_size for token_id in prompt.token_ids):
            raise RequestError("invalid_field", f"ids must lie in [0, {facts.vocab_size - 1}]", field="token_ids")
        ids = prompt.token_ids
    elif prompt.text is not None:
        _check_text(prompt.text, limits.max_prompt_bytes, "prompt")
        ids = await tokenization.encode_text(prompt.text) if prompt.text else ()
    else:
        messages = prompt.messages or ()
        room = limits.max_prompt_bytes
        for index, (_, content) in enumerate(messages):
            room -= _check_text(content, room, f"messages[{index}].content")
        ids = await tokenization.encode_chat(messages) if messages else ()
    if not ids:
        raise RequestError("invalid_field", "must not be empty", field=given[0])
    if len(ids) >= facts.max_model_len:
        raise RequestError(
            "prompt_too_long", f"the prompt has {len(ids)} tokens; the context has {facts.max_model_len}", field=given[0]
        )
    return ids


def _inputs(prompt: PromptRequest) -> dict[str, object]:
    return {"prompt": prompt.text, "messages": prompt.messages, "token_ids": prompt.token_ids}


def _check_text(text: str, room: int, field: str) -> int:
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise RequestError("invalid_field", "holds half of a surrogate pair, which is no character", field=field) from error
    if size > room:
        raise RequestError("prompt_too_long", "the text is longer than admission.max_prompt_bytes allows", field=field)
    return size


def resolve(
    prompt: PromptRequest,
    call: Call,
    ids: tuple[int, ...],
    tokenization: Tokenization,
    facts: EngineFacts,
    limits: Limits,
    draw_seed: Callable[[], int],
) -> Resolved:
    """Raises `RequestError`: `invalid_field` that names it, or `too_many_tokens` for what can never fit."""
    fields = prompt.sampling
    _check_stop(fields.stop)
    room = facts.max_model_len - len(ids)
    max_tokens = fields.max_tokens
    if max_tokens is None:
        max_tokens = min(tokenization.defaults.max_new_tokens or limits.max_tokens_cap, limits.max_tokens_cap, room)
        # min_tokens alone asks for at least that many; whether they fit is checked like any other number.
        max_tokens = max(max_tokens, fields.min_tokens or 0)
    seed = call.seed if call.seed is not None else fields.seed
    try:
        sampling = SamplingParams(
            max_tokens=max_tokens, seed=draw_seed() if seed is None else seed, **_sampling_arguments(fields, tokenization)
        )
        request = Request(
            request_id=call.request_id,
            prompt_token_ids=ids,
            sampling=sampling,
            output_token_ids=call.said,
            cache_salt=call.tenant,
        )
    except InvalidFieldError as error:
        raise RequestError("invalid_field", error.message, field=error.field) from error
    _check_ids(request, facts)
    _check_fits(request, facts, room)
    return Resolved(request=request, stop=fields.stop, cost_tokens=len(ids) + sampling.n * max_tokens)


def check_sampling(fields: SamplingFields) -> None:
    """Raises `RequestError` (`invalid_field`) for what no model takes; for prompts that are resolved elsewhere, later."""
    given = {name: value for name in _PLAIN if (value := getattr(fields, name)) is not None}
    max_tokens = max(1, fields.min_tokens or 0) if fields.max_tokens is None else fields.max_tokens
    try:
        SamplingParams(
            max_tokens=max_tokens,
            seed=fields.seed or 0,
            logit_bias=fields.logit_bias,
            stop_token_ids=fields.stop_token_ids,
            **given,
        )
    except InvalidFieldError as error:
        raise RequestError("invalid_field", error.message, field=error.field) from error


def _sampling_arguments(fields: SamplingFields, tokenization: Tokenization) -> dict[str, Any]:
    arguments: dict[str, Any] = {"logit_bias": fields.logit_bias, "stop_token_ids": fields.stop_token_ids}
    for name in _PLAIN:
        value = getattr(fields, name)
        if value is None:
            value = getattr(tokenization.defaults, name, None)
        if value is not None:
            arguments[name] = value
    return arguments


def _check_stop(stop: tuple[str, ...]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise RequestError("invalid_field", f"takes at most {MAX_STOP_STRINGS} strings", field="sampling.stop")
    for index, text in enumerate(stop):
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            message = f"must have 1 to {MAX_STOP_CHARACTERS} characters"
            raise RequestError("invalid_field", message, field=f"sampling.stop[{index}]")


def _check_ids(request: Request, facts: EngineFacts) -> None:
    for field, ids in (
        ("sampling.stop_token_ids", request.sampling.stop_token_ids),
        ("sampling.logit_bias", tuple(request.sampling.logit_bias)),
        *(("output_token_ids", said) for said in request.output_token_ids),
    ):
        if not all(0 <= token_id < facts.vocab_size for token_id in ids):
            raise RequestError("invalid_field", f"ids must lie in [0, {facts.vocab_size - 1}]", field=field)


def _check_fits(request: Request, facts: EngineFacts, room: int) -> None:
    max_tokens = request.sampling.max_tokens
    if max_tokens > room:
        raise RequestError(
            "too_many_tokens",
            f"prompt + max_tokens is {len(request.prompt_token_ids) + max_tokens}; the context has {facts.max_model_len}",
            field="sampling.max_tokens",
        )
    blocks = -(-(len(request.prompt_token_ids) + max_tokens) // facts.block_size)
    if blocks > facts.num_blocks:
        raise RequestError(
            "too_many_tokens", f"needs {blocks} KV blocks; the pool has {facts.num_blocks}", field="sampling.max_tokens"
        )
