"""Tokens to text as they come: what is streamed, joined, is the text of the whole.

`TokenPieces` knows each token's bytes; an `IncrementalDetokenizer` a choice joins them, holding back at most the three bytes of an
unfinished character; a `StopStringMatcher` a choice holds back what may begin a stop string. Both are linear in the text.

Equal to `tokenizers.Tokenizer.decode(ids, skip_special_tokens=True)` with one stated difference: for vocabularies with byte
fallback, a run of byte tokens that is no valid UTF-8 keeps its whole characters and replaces the rest, where the library replaces
every byte of the run (knowing that takes the whole run, which would stop the stream for as long as it lasts).
"""

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of the GPT-2 byte-level alphabet: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_Utf8 = codecs.getincrementaldecoder("utf-8")


class UnsupportedDecoderError(Exception):
    """tokenizer.json names a decoder whose text cannot be made a token at a time."""


class _Pieces(dict[int, bytes]):
    """Computes what it lacks: the look-up of what it has then needs no Python."""

    def __init__(self, compute: Callable[[int], bytes]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, token_id: int) -> bytes:
        found = self[token_id] = self._compute(token_id)
        return found


class TokenPieces:
    """Each token's bytes in a text, by the tokenizer's own decoder. Special tokens have none.

    Raises `UnsupportedDecoderError` for decoders other than ByteLevel, Metaspace, and Replace / ByteFallback / Fuse / Strip.
    """

    def __init__(self, tokenizer: Tokenizer, decoder: Mapping[str, Any] | None) -> None:
        self._tokenizer = tokenizer
        self._special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._alphabet: dict[str, int] = {}
        self._replacements: list[tuple[str, str]] = []
        self._byte_fallback = False
        self.leading_spaces = 0
        """Spaces that the decoder takes from the start of a whole text."""
        self._cache = _Pieces(self._compute)
        self.piece: Callable[[int], bytes] = self._cache.__getitem__
        """The token's bytes: part of a character, or many; empty for special tokens and ids that the vocabulary lacks."""
        for step in _steps(decoder):
            self._take(step)

    def _take(self, step: Mapping[str, Any]) -> None:
        kind = step.get("type")
        if kind == "ByteLevel":
            self._alphabet = _byte_level_alphabet()
        elif kind == "ByteFallback":
            self._byte_fallback = True
        elif kind == "Metaspace":
            self._replacements.append((step["replacement"], " "))
            self.leading_spaces = int(step.get("prepend_scheme", "always") != "never")
        elif kind == "Replace" and "String" in step["pattern"]:
            self._replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Strip" and step["content"] == " " and step["stop"] == 0:
            self.leading_spaces = step["start"]
        elif kind != "Fuse":
            raise UnsupportedDecoderError(f"decoder {kind}")

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def text(self, token_id: int) -> str:
        """The token alone as a text, special ones by their name; U+FFFD for what is no whole character."""
        if token_id in self._special:
            return self._tokenizer.id_to_token(token_id) or ""
        return self.piece(token_id).decode("utf-8", "replace")

    def _compute(self, token_id: int) -> bytes:
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self._replacements:
            token = token.replace(old, new)
        if self._alphabet.keys() >= set(token):
            return bytes([self._alphabet[character] for character in token])
        return token.encode("utf-8")  # no alphabet, or an added token, which stands for itself


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        raise UnsupportedDecoderError("no decoder")
    return list(decoder["decoders"]) if decoder.get("type") == "Sequence" else [decoder]


class IncrementalDetokenizer:
    """One choice's text. `push` gives what became whole; `finish` the rest, once."""

    def __init__(self, pieces: TokenPieces) -> None:
        self._pieces = pieces
        self._decoder = _Utf8("replace")
        self._strip = pieces.leading_spaces

    def push(self, *token_ids: int) -> str:
        """The same text whether tokens come one by one or together; together costs less."""
        return self._trim(self._decoder.decode(b"".join(map(self._pieces.piece, token_ids))))

    def finish(self) -> str:
        """U+FFFD when the last character was never completed, else nothing."""
        return self._trim(self._decoder.decode(b"", final=True))

    def _trim(self, text: str) -> str:
        if not self._strip or not text:
            return text
        kept = text[: self._strip].lstrip(" ") + text[self._strip :]
        # Stripping ends at the first character that is no space, or once the count is reached.
        removed = len(text) - len(kept)
        self._strip = self._strip - removed if not kept else 0
        return kept


class StopStringMatcher:
    """Lets text through up to the first stop string that is completed; of several completed at once, the longest counts.

    Holds back only what may begin a stop string (Knuth, Morris, Pratt 1977: one automaton a string, each character seen once).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _failures(stop)) for stop in stops]
        self._states = [0] * len(self._stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """What can be shown now. Sets `matched` when a stop string was completed; the text then ends before it, for good.

        `may_stop=False` (fewer than min_tokens said): a string that is completed here does not count.
        """
        if not self._stops or not text:
            return text
        buffer = self._held + text
        for index in range(len(self._held), len(buffer)):
            stop = self._advance(buffer[index])
            if stop is not None and may_stop:
                self.matched = stop
                self._held = ""
                return buffer[: index + 1 - len(stop)]
        hold = max(self._states)
        self._held = buffer[len(buffer) - hold :]
        return buffer[: len(buffer) - hold]

    def finish(self) -> str:
        """What was held back and began no stop string after all."""
        rest, self._held = self._held, ""
        return rest

    def _advance(self, character: str) -> str | None:
        completed: str | None = None
        for number, (stop, failures) in enumerate(self._stops):
            state = self._states[number]
            while state and stop[state] != character:
                state = failures[state]
            if stop[state] == character:
                state += 1
            if state == len(stop):
                state = failures[state]
                if completed is None or len(stop) > len(completed):
                    completed = stop
            self._states[number] = state
        return completed


def _failures(stop: str) -> list[int]:
    """For each length of a matched beginning, the longest shorter beginning that is also its end."""
    failures = [0] * (len(stop) + 1)
    state = 0
    for index in range(1, len(stop)):
        while state and stop[index] != stop[state]:
            state = failures[state]
        if stop[index] == stop[state]:
            state += 1
        failures[index + 1] = state
    return failures
