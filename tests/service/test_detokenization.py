"""Tokens to text as they come: equal to the whole, nothing shown too early, nothing held too long."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from service.detokenization import IncrementalDetokenizer, StopStringMatcher, TokenPieces, UnsupportedDecoderError
from tests.service.tiny_tokenizer import tiny_tokenizer

TINY = tiny_tokenizer()
PIECES = TokenPieces(TINY, json.loads(TINY.to_str())["decoder"])

FALLBACK_NAMES = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁he", "llo", "▁▁", "é"]


def fallback_tokenizer() -> Tokenizer:
    """As Llama 2 and Mistral have it: byte fallback, spaces as U+2581, one leading space stripped."""
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(FALLBACK_NAMES)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


FALLBACK = fallback_tokenizer()
FALLBACK_PIECES = TokenPieces(FALLBACK, json.loads(FALLBACK.to_str())["decoder"])


def streamed(pieces: TokenPieces, ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(pieces)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(0, TINY.get_vocab_size() - 1), max_size=80))
def test_streamed_text_equals_the_whole_for_any_tokens(ids: list[int]) -> None:
    assert "".join(streamed(PIECES, ids)) == TINY.decode(ids, skip_special_tokens=True)


@settings(max_examples=400, deadline=None)
@given(st.text(max_size=60))
def test_any_text_comes_back_through_its_tokens(text: str) -> None:
    assert "".join(streamed(PIECES, TINY.encode(text).ids)) == text


@settings(max_examples=400, deadline=None)
@given(st.text(max_size=20))
def test_byte_fallback_text_equals_the_whole(text: str) -> None:
    ids = [FALLBACK.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    assert "".join(streamed(FALLBACK_PIECES, ids)) == FALLBACK.decode(ids, skip_special_tokens=True)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from([1, *range(258, len(FALLBACK_NAMES))]), max_size=20))
def test_metaspace_text_equals_the_whole(ids: list[int]) -> None:
    assert "".join(streamed(FALLBACK_PIECES, ids)) == FALLBACK.decode(ids, skip_special_tokens=True)


def test_a_split_character_is_held_until_it_is_whole() -> None:
    ids = TINY.encode("€").ids
    assert streamed(PIECES, ids) == ["", "", "€", ""]


def test_an_unfinished_character_at_the_end_is_replaced() -> None:
    assert streamed(PIECES, TINY.encode("€").ids[:2]) == ["", "", "\ufffd"]


def test_a_decoder_that_cannot_stream_is_refused() -> None:
    with pytest.raises(UnsupportedDecoderError, match="WordPiece"):
        TokenPieces(TINY, {"type": "WordPiece"})


@pytest.mark.model
@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_streamed_text_equals_the_whole_with_the_real_tokenizer(data: st.DataObject) -> None:
    tokenizer, pieces = _real()
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=60))
    assert "".join(streamed(pieces, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


_loaded: list[tuple[Tokenizer, TokenPieces]] = []


def _real() -> tuple[Tokenizer, TokenPieces]:
    if not _loaded:
        from tests.servers.model import model_dir

        file = Path(model_dir()) / "tokenizer.json"
        tokenizer = Tokenizer.from_file(str(file))
        _loaded.append((tokenizer, TokenPieces(tokenizer, json.loads(file.read_text())["decoder"])))
    return _loaded[0]


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The specification: look at every end in turn; the longest of the strings that end there counts."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_stop_strings_are_found_over_any_boundaries(parts: list[str], stops: list[str]) -> None:
    matcher = StopStringMatcher(stops)
    shown = ""
    for part in parts:
        shown += matcher.push(part)
        if matcher.matched is not None:
            break
    shown += matcher.finish()
    assert (shown, matcher.matched) == naive("".join(parts), stops)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopStringMatcher(["END"])
    assert [matcher.push(part) for part in ("a", "bE", "N", "x", "E")] == ["a", "b", "", "ENx", ""]
    assert matcher.finish() == "E"


def test_a_stop_string_completed_too_early_does_not_count() -> None:
    matcher = StopStringMatcher(["ab"])
    assert matcher.push("xab", may_stop=False) == "xab"
    assert (matcher.push("yab"), matcher.matched) == ("y", "ab")
