"""Text to tokens, by the model's own tokenizer.json and chat template; equal to transformers for every ordinary text.

Reads four small files of a model directory and nothing else; imports neither torch nor transformers. Control tokens that a user
typed are text (`control_tokens.py`); whoever wants them as control sends token ids. Large prompts are encoded in a worker thread,
so that the event loop goes on. The way back, tokens to text, is `detokenization.py`.
"""

import asyncio
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from engine import InvalidFieldError, SamplingParams
from service.chat_template import ChatTemplate, TemplateRefusedError
from service.control_tokens import ControlTokens, load_tokenizer
from service.detokenization import IncrementalDetokenizer, TokenPieces, UnsupportedDecoderError
from service.errors import RequestError, SetupError

INLINE_BYTES = 4096
"""Longer texts are encoded in a worker thread: 4 KiB take about a millisecond, which the event loop can spare."""

_ROLE = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,31}")
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What generation_config.json says about fields that a caller left out; None: it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


class Tokenization:
    """One model's tokenizer, template and defaults.

    Raises `SetupError` that names the file when one is missing or cannot be used. A model without a chat template serves
    texts and token ids; its chats are refused.
    """

    def __init__(self, model_dir: Path, *, nonce: str | None = None, now: Callable[[], datetime] = datetime.now) -> None:
        file = model_dir / "tokenizer.json"
        definition = _read_json(file, required=True) | {"truncation": None, "padding": None}
        try:
            self._tokenizer = load_tokenizer(definition)
            self._control = ControlTokens(definition, nonce or secrets.token_hex(8))
            self.pieces = TokenPieces(self._tokenizer, definition.get("decoder"))
        except (ValueError, KeyError, TypeError, UnsupportedDecoderError) as error:
            raise SetupError(
                f"{file} is no tokenizer that can be used ({error}); copy the file from the model again"
            ) from error
        self._template = _chat_template(model_dir, now)
        self.defaults = _defaults(model_dir)

    async def encode_text(self, text: str) -> tuple[int, ...]:
        """Ids of a plain text, with what the tokenizer puts around one. Control tokens that it spells are text."""
        return await self._off_loop(self._encode_text, text, len(text))

    async def encode_chat(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Ids of a conversation as the model's template renders it, up to where the answer begins.

        Raises `RequestError` (`invalid_field`) for a bad role, messages that the template refuses, or a model without one.
        """
        return await self._off_loop(self._encode_chat, messages, sum(len(content) for _, content in messages))

    def detokenizer(self) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self.pieces)

    def num_characters(self, token_ids: Sequence[int]) -> int:
        """Characters that are whole once these tokens of a choice, its first ones, were said."""
        return len(self.detokenizer().push(*token_ids))

    async def _off_loop(self, encode: Callable[[Any], tuple[int, ...]], argument: object, size: int) -> tuple[int, ...]:
        if size <= INLINE_BYTES:
            return encode(argument)
        return await asyncio.to_thread(encode, argument)

    def _encode_text(self, text: str) -> tuple[int, ...]:
        if self._control.appear_in(text):
            return tuple(self._control.encode_text(text))
        return tuple(self._tokenizer.encode(text).ids)

    def _encode_chat(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        if self._template is None:
            raise RequestError(
                "invalid_field", "this model has no chat template; send `prompt` or `token_ids`", field="messages"
            )
        for index, (role, _) in enumerate(messages):
            if not _ROLE.fullmatch(role):
                raise RequestError("invalid_field", "must be a short word such as user", field=f"messages[{index}].role")
        spells_control = any(self._control.appear_in(content) for _, content in messages)
        if spells_control:
            messages = [(role, self._control.hide(content)) for role, content in messages]
        try:
            rendered = self._template.render(messages)
        except TemplateRefusedError as error:
            raise RequestError("invalid_field", f"the model's chat template refuses them: {error}", field="messages") from error
        if spells_control:
            return tuple(self._control.encode_rendered(rendered))
        return tuple(self._tokenizer.encode(rendered, add_special_tokens=False).ids)


def _read_json(file: Path, *, required: bool = False) -> dict[str, Any]:
    try:
        content = msgspec.json.decode(file.read_bytes())
    except FileNotFoundError as error:
        if not required:
            return {}
        raise SetupError(f"{file} is missing; `sluice model import` writes it, or copy it from the model") from error
    except OSError as error:
        raise SetupError(f"cannot read {file}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise SetupError(f"{file} is not valid JSON ({error}); copy it from the model again") from error
    if not isinstance(content, dict):
        raise SetupError(f"{file} holds no JSON object; copy it from the model again")
    return content


def _chat_template(model_dir: Path, now: Callable[[], datetime]) -> ChatTemplate | None:
    config_file = model_dir / "tokenizer_config.json"
    config = _read_json(config_file)
    own_file = model_dir / "chat_template.jinja"
    try:
        source = own_file.read_text(encoding="utf-8") if own_file.exists() else _default_template(config.get("chat_template"))
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"cannot read {own_file}: {error}") from error
    if source is None:
        return None
    names = {name: _token_text(config[name]) for name in _TOKEN_NAMES if config.get(name) is not None}
    try:
        return ChatTemplate(source, names, now=now)
    except TemplateRefusedError as error:
        raise SetupError(f"{own_file if own_file.exists() else config_file}: {error}") from error


def _default_template(value: object) -> str | None:
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _token_text(value: object) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value)


def _defaults(model_dir: Path) -> GenerationDefaults:
    file = model_dir / "generation_config.json"
    try:
        defaults = msgspec.convert(_read_json(file), GenerationDefaults)
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if (value := getattr(defaults, name)) is not None
        }
        SamplingParams(max_tokens=1, seed=0, **given)
    except msgspec.ValidationError as error:
        raise SetupError(f"{file}: {error}; correct it or remove the file") from error
    except InvalidFieldError as error:
        raise SetupError(
            f"{file}: {error.field.removeprefix('sampling.')} {error.message}; correct it or remove the file"
        ) from error
    if defaults.max_new_tokens is not None and defaults.max_new_tokens < 1:
        raise SetupError(f"{file}: max_new_tokens must be at least 1; correct it or remove the file")
    return defaults
