"""The limits that hold for every prompt, whichever codec read it.

A `PromptRequest` that passes `check` is within every limit that needs neither the model nor its tokenizer, and a message can say
it. Ranges of sampling numbers are the engine's (`SamplingParams`), and context length is admission's.
"""

import math
import operator
from dataclasses import fields

from engine.request import MAX_SEED, RANGES
from service.contract import PromptRequest, SamplingFields
from service.errors import RequestError

MAX_LABEL_BYTES = 256
MAX_MODEL_BYTES = 256
MAX_METADATA_PAIRS = 16
MAX_METADATA_BYTES = 256
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_ROLE_BYTES = 64
UINT32_MAX = 2**32 - 1
# What the message holds, of a seed what any engine takes: the narrower ranges are checked where a request is resolved.
_HELD = {
    "max_tokens": (0, UINT32_MAX),
    "min_tokens": (0, UINT32_MAX),
    "seed": (0, MAX_SEED),
    "top_k": (-(2**31), 2**31 - 1),
    "logprobs": (0, UINT32_MAX),
    "n": (0, UINT32_MAX),
}
_SAMPLING_NAMES = tuple(field.name for field in fields(SamplingFields))
_sampling_values = operator.attrgetter(*_SAMPLING_NAMES)


def invalid(field: str, message: str) -> RequestError:
    """An `invalid_field` error at `field` (its path in the message)."""
    return RequestError("invalid_field", message, field=field)


def check(request: PromptRequest) -> PromptRequest:
    """Gives `request` back. Raises `RequestError` (`invalid_field`) that names the first field over a limit."""
    _check_input(request)
    check_text("model", request.model, MAX_MODEL_BYTES)
    check_text("label", request.label, MAX_LABEL_BYTES)
    _check_metadata(request)
    _check_sampling(request.sampling)
    return request


def check_text(field: str, value: str, max_bytes: int | None = None) -> None:
    """`value` must encode as UTF-8 (no unpaired surrogate) in at most `max_bytes`."""
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        raise invalid(field, "holds an unpaired surrogate, which UTF-8 cannot say") from None
    if max_bytes is not None and size > max_bytes:
        raise invalid(field, f"is {size} bytes long; at most {max_bytes}")


def _check_input(request: PromptRequest) -> None:
    given = [name for name in ("text", "messages", "token_ids") if getattr(request, name) is not None]
    if not given:
        raise invalid("prompt", "one of prompt, messages and token_ids must be given")
    if len(given) > 1:
        raise invalid(
            "token_ids" if "token_ids" in given else "messages", "only one of prompt, messages and token_ids may be given"
        )
    if request.text is not None:
        if not request.text:
            raise invalid("prompt", "must not be empty")
        check_text("prompt", request.text)
    elif request.messages is not None:
        if not request.messages:
            raise invalid("messages", "must hold at least one message")
        for index, (role, content) in enumerate(request.messages):
            if not role:
                raise invalid(f"messages[{index}].role", "must not be empty")
            check_text(f"messages[{index}].role", role, MAX_ROLE_BYTES)
            check_text(f"messages[{index}].content", content)
    elif not request.token_ids:
        raise invalid("token_ids", "must hold at least one token id")


def _check_metadata(request: PromptRequest) -> None:
    if len(request.metadata) > MAX_METADATA_PAIRS:
        raise invalid("metadata", f"holds {len(request.metadata)} pairs; at most {MAX_METADATA_PAIRS}")
    for key, value in request.metadata.items():
        check_text("metadata", key, MAX_METADATA_BYTES)
        check_text("metadata", value, MAX_METADATA_BYTES)


def _check_sampling(sampling: SamplingFields) -> None:
    if len(sampling.stop) > MAX_STOP_STRINGS:
        raise invalid("sampling.stop", f"holds {len(sampling.stop)} strings; at most {MAX_STOP_STRINGS}")
    for index, stop in enumerate(sampling.stop):
        if not stop:
            raise invalid(f"sampling.stop[{index}]", "must not be empty")
        if len(stop) > MAX_STOP_CHARACTERS:
            raise invalid(f"sampling.stop[{index}]", f"is {len(stop)} characters long; at most {MAX_STOP_CHARACTERS}")
        check_text(f"sampling.stop[{index}]", stop)
    for name, value in zip(_SAMPLING_NAMES, _sampling_values(sampling), strict=True):
        held = _HELD.get(name)
        if held is not None and value is not None and not held[0] <= value <= held[1]:
            raise invalid(f"sampling.{name}", RANGES[name])
        if isinstance(value, float) and not math.isfinite(value):
            raise invalid(f"sampling.{name}", "must be a finite number")
    if any(not math.isfinite(bias) for bias in sampling.logit_bias.values()):
        raise invalid("sampling.logit_bias", "must hold finite numbers")
