"""Reads a prompt from JSON: the canonical mapping of `sluice.v1.Prompt` in snake_case, strictly.

Guarantees: whatever the bytes are, the answer is a `PromptRequest` or a `RequestError` that names the field; no message holds
text of the prompt. Beyond the mapping, `messages` and `token_ids` may be plain lists. `null` means absent, as in the mapping.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from service.contract import PromptRequest, SamplingFields
from service.errors import RequestError
from service.wire_limits import UINT32_MAX, invalid

_T = TypeVar("_T")
_MAX_NUMBER_CHARACTERS = 32
_MAX_SHOWN_CHARACTERS = 64
_PROMPT_KEYS = ("prompt", "messages", "token_ids", "model", "sampling", "label", "ttl_ms", "metadata")


class _NoNumber:
    """Stands where JSON held a number that no field can take, so that the field's reader can name the field."""

    def __init__(self, what: str) -> None:
        self.what = what


def prompt_from_json(value: bytes) -> PromptRequest:
    """The prompt that `value` holds, not yet checked against limits.

    Raises `RequestError`: `invalid_json`, `unknown_field` or `invalid_field`.
    """
    document = _document(value)
    _known(document, _PROMPT_KEYS, "")
    return PromptRequest(
        text=_optional(document, "prompt", _string, ""),
        messages=_optional(document, "messages", _messages, ""),
        token_ids=_optional(document, "token_ids", _token_ids, ""),
        model=_optional(document, "model", _string, "") or "",
        sampling=_optional(document, "sampling", _sampling, "") or SamplingFields(),
        label=_optional(document, "label", _string, "") or "",
        ttl_ms=_optional(document, "ttl_ms", _uint32, "") or 0,
        metadata=_optional(document, "metadata", _string_map, "") or {},
    )


def _document(value: bytes) -> dict[str, Any]:
    try:
        text = value.decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        raise RequestError("invalid_json", f"is no valid UTF-8 at byte {error.start}") from None
    try:
        document = json.loads(
            text, object_pairs_hook=_pairs, parse_int=_parse_int, parse_float=_parse_float, parse_constant=_NoNumber
        )
    except json.JSONDecodeError as error:
        raise RequestError("invalid_json", f"{error.msg} at character {error.pos}") from None
    except RecursionError:
        raise RequestError("invalid_json", "is nested too deeply") from None
    if not isinstance(document, dict):
        raise RequestError("invalid_json", f"must be an object, not {_kind(document)}")
    return document


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for key, value in pairs:
        if key in read:
            raise RequestError("invalid_json", "the key stands twice in one object", field=_shown(key))
        read[key] = value
    return read


def _parse_int(digits: str) -> int | _NoNumber:
    return int(digits) if len(digits) <= _MAX_NUMBER_CHARACTERS else _NoNumber(f"an integer of {len(digits)} characters")


def _parse_float(digits: str) -> float | _NoNumber:
    number = float(digits)
    return number if math.isfinite(number) else _NoNumber("a number beyond double precision")


def _known(document: Mapping[str, Any], names: tuple[str, ...], path: str) -> None:
    for key in document:
        if key not in names:
            raise RequestError("unknown_field", "this version has no such field", field=f"{path}{_shown(key)}")


def _shown(key: str) -> str:
    # A key comes from the caller: shown whole only while it is as short as a name, and never with control characters.
    clean = key.encode("unicode_escape", "backslashreplace").decode("ascii") if not key.isprintable() else key
    return clean if len(clean) <= _MAX_SHOWN_CHARACTERS else f"{clean[:_MAX_SHOWN_CHARACTERS]}…"


def _kind(value: object) -> str:
    if isinstance(value, _NoNumber):
        return value.what
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        type(None): "null",
    }
    return names[type(value)]


def _optional(document: Mapping[str, Any], key: str, read: Callable[[Any, str], _T], path: str) -> _T | None:
    value = document.get(key)
    return None if value is None else read(value, f"{path}{key}")


def _string(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise invalid(path, f"must be a string, not {_kind(value)}")
    return value


def _boolean(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise invalid(path, f"must be true or false, not {_kind(value)}")
    return value


def _number(value: Any, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise invalid(path, f"must be a finite number, not {_kind(value)}")
    return float(value)


def _integer(value: Any, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(path, f"must be an integer, not {_kind(value)}")
    return value


def _uint32(value: Any, path: str) -> int:
    if not 0 <= _integer(value, path) <= UINT32_MAX:
        raise invalid(path, f"must lie in [0, {UINT32_MAX}]")
    return int(value)


def _long(value: Any, path: str) -> int:
    # The canonical mapping writes 64-bit integers as strings; a plain integer is taken as well.
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= _MAX_NUMBER_CHARACTERS:
        value = int(value)
    return _integer(value, path)


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise invalid(path, f"must be a list, not {_kind(value)}")
    return value


def _object(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid(path, f"must be an object, not {_kind(value)}")
    return value


def _wrapped(value: Any, path: str, key: str) -> tuple[list[Any], str]:
    """The list in `value`, which is the list itself or the canonical {key: list}; and the list's path."""
    if not isinstance(value, dict):
        return _list(value, path), path
    _known(value, (key,), f"{path}.")
    inner = value.get(key)
    return _list([] if inner is None else inner, f"{path}.{key}"), f"{path}.{key}"


def _messages(value: Any, path: str) -> tuple[tuple[str, str], ...]:
    items, inside = _wrapped(value, path, "items")
    return tuple(_message(item, f"{inside}[{index}]") for index, item in enumerate(items))


def _message(value: Any, path: str) -> tuple[str, str]:
    message = _object(value, path)
    _known(message, ("role", "content"), f"{path}.")
    role = _optional(message, "role", _string, f"{path}.")
    content = _optional(message, "content", _string, f"{path}.")
    return role or "", content or ""


def _token_ids(value: Any, path: str) -> tuple[int, ...]:
    items, inside = _wrapped(value, path, "ids")
    return tuple(_uint32(item, f"{inside}[{index}]") for index, item in enumerate(items))


def _uint32_list(value: Any, path: str) -> tuple[int, ...]:
    return tuple(_uint32(item, f"{path}[{index}]") for index, item in enumerate(_list(value, path)))


def _string_list(value: Any, path: str) -> tuple[str, ...]:
    return tuple(_string(item, f"{path}[{index}]") for index, item in enumerate(_list(value, path)))


def _string_map(value: Any, path: str) -> dict[str, str]:
    return {key: _string(item, f"{path}.{_shown(key)}") for key, item in _object(value, path).items()}


def _logit_bias(value: Any, path: str) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, item in _object(value, path).items():
        inside = f"{path}.{_shown(key)}"
        if not (key.isascii() and key.isdigit() and len(key) <= _MAX_NUMBER_CHARACTERS):
            raise invalid(inside, "the key must be a token id")
        token_id = _uint32(int(key), inside)
        if token_id in biases:
            raise invalid(inside, "the token id stands twice")
        biases[token_id] = _number(item, inside)
    return biases


# Ranges of the integers are those of every codec: `wire_limits.check` has them.
_SAMPLING_READERS: dict[str, Callable[[Any, str], Any]] = {
    "max_tokens": _integer,
    "min_tokens": _integer,
    "temperature": _number,
    "top_p": _number,
    "top_k": _integer,
    "min_p": _number,
    "presence_penalty": _number,
    "frequency_penalty": _number,
    "repetition_penalty": _number,
    "logit_bias": _logit_bias,
    "stop": _string_list,
    "stop_token_ids": _uint32_list,
    "ignore_eos": _boolean,
    "logprobs": _integer,
    "n": _integer,
    "seed": _long,
}


def _sampling(value: Any, path: str) -> SamplingFields:
    given = _object(value, path)
    _known(given, tuple(_SAMPLING_READERS), f"{path}.")
    return SamplingFields(
        **{name: read(given[name], f"{path}.{name}") for name, read in _SAMPLING_READERS.items() if given.get(name) is not None}
    )
