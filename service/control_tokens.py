"""Control tokens in what a user typed are text: `<|im_end|>` in a message never ends a turn.

How: a second tokenizer is made in which every control token has a secret name (a random nonce a process), so that no text from
outside can spell one. A chat is rendered with stand-ins where its contents spell a control token; then the control tokens that the
*template* wrote get their secret names, and the stand-ins become the user's characters again. Contents that spell none, nearly all,
take neither step and are encoded as transformers encodes them.
Control tokens are the vocabulary's added tokens with `special: true`; other added tokens (`<think>`) are ordinary vocabulary.
"""

import copy
import re
from collections.abc import Sequence
from typing import Any

import msgspec
from tokenizers import Tokenizer

# Private-use characters: no normalizer touches them, and pre-tokenizers do not matter inside an added token.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"


class ControlTokens:
    """The control tokens of one vocabulary. `definition`: tokenizer.json, parsed. `nonce`: hexadecimal, not to be guessed."""

    def __init__(self, definition: dict[str, Any], nonce: str) -> None:
        tokens = [token for token in definition["added_tokens"] if token["special"]]
        self._names = sorted((token["content"] for token in tokens), key=len, reverse=True)
        self._pattern = re.compile("|".join(re.escape(name) for name in self._names)) if self._names else None
        self._secret = {name: f"{_OPEN}{nonce}c{index}{_CLOSE}" for index, name in enumerate(self._names)}
        self._stand_in = {name: f"{_OPEN}{nonce}u{index}{_CLOSE}" for index, name in enumerate(self._names)}
        self._guarded = _renamed(definition, self._secret) if tokens else None
        if self._guarded is not None:
            for token in tokens:
                if self._guarded.token_to_id(self._secret[token["content"]]) != token["id"]:
                    raise ValueError(f"control token {token['content']} has no stable id")

    def appear_in(self, text: str) -> bool:
        return self._pattern is not None and self._pattern.search(text) is not None

    def hide(self, content: str) -> str:
        """`content` with a stand-in for each control token that it spells."""
        if self._pattern is None:
            return content
        return self._pattern.sub(lambda match: self._stand_in[match[0]], content)

    def encode_rendered(self, rendered: str) -> list[int]:
        """Ids of a chat that was rendered from hidden contents: the template's control tokens are control, the users' are text."""
        for name in self._names:
            rendered = rendered.replace(name, self._secret[name])
        for name, stand_in in self._stand_in.items():
            rendered = rendered.replace(stand_in, name)
        return self._encode(rendered, add_special_tokens=False)

    def encode_text(self, text: str) -> list[int]:
        """Ids of a plain text in which nothing is control; what the tokenizer puts around a text (BOS) is added."""
        return self._encode(text, add_special_tokens=True)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert self._guarded is not None, "called only where a control token appeared"
        return list(self._guarded.encode(text, add_special_tokens=add_special_tokens).ids)


def load_tokenizer(definition: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a parsed tokenizer.json defines. Raises `ValueError` when it defines none."""
    try:
        return Tokenizer.from_str(msgspec.json.encode(definition).decode())
    except Exception as error:  # the library raises bare Exception, and nothing narrower, for what it cannot read
        raise ValueError(str(error)) from error


def _renamed(definition: dict[str, Any], names: dict[str, str]) -> Tokenizer:
    """The same tokenizer, same ids, with other names for some added tokens."""
    changed = copy.copy(definition)
    changed["added_tokens"] = [
        {**token, "content": names.get(token["content"], token["content"])} if token["special"] else token
        for token in definition["added_tokens"]
    ]
    changed["model"] = model = dict(definition["model"])
    model["vocab"] = _renamed_vocab(model["vocab"], names)
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return load_tokenizer(changed)


def _renamed_vocab(vocab: dict[str, int] | Sequence[Sequence[Any]], names: dict[str, str]) -> Any:
    if isinstance(vocab, dict):
        return {names.get(token, token): token_id for token, token_id in vocab.items()}
    return [[names.get(token, token), score] for token, score in vocab]
