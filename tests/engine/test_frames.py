"""The engine's wire: what is decoded is what was encoded, however the bytes are cut; anything else ends the stream with a typed error."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import PlainTokens, StepOutput, TokenLogprobs, TokenOutput
from engine.errors import FrameError
from engine.frames import FrameDecoder, FrameKind, encode
from tests.service.fake_engine import facts, stats

FIRST = TokenOutput(request_id="a", choice=0, seq=0, token_ids=(7,), facts=facts(1, 2, 3))
SINGLE = TokenOutput(request_id="b", choice=1, seq=4, token_ids=(8,))
PAIR = TokenOutput(request_id="c", choice=0, seq=1, token_ids=(1, 2))
SCORED = TokenOutput(request_id="d", choice=0, seq=1, token_ids=(9,), logprobs=(TokenLogprobs(token_id=9, logprob=-0.5),))
LAST = TokenOutput(request_id="e", choice=0, seq=9, token_ids=(3,), finish_reason="stop", stop_token_id=3)
STEP = StepOutput(outputs=(FIRST, SINGLE, PAIR, SCORED, LAST), stats=stats(5))


def test_a_single_token_and_nothing_else_goes_into_columns() -> None:
    packed = STEP.packed()
    assert packed.outputs == (FIRST, PAIR, SCORED, LAST)
    assert packed.plain == PlainTokens(request_ids=("b",), choices=(1,), seqs=(4,), token_ids=(8,))
    assert sorted(packed.every(), key=lambda output: output.request_id) == list(STEP.outputs)


def test_what_is_in_columns_already_stays_there() -> None:
    packed = STEP.packed()
    assert packed.packed() is packed
    again = StepOutput(outputs=(SINGLE,), stats=stats(5), plain=packed.plain).packed()
    assert (again.outputs, list(again.plain.outputs())) == ((), [SINGLE, SINGLE])


@given(st.lists(st.integers(1, 40), max_size=30))
def test_frames_decode_however_they_are_cut(cuts: list[int]) -> None:
    data = encode(STEP.packed()) + encode(StepOutput(outputs=(), stats=stats(6)))
    decoder, heard, position = FrameDecoder(), [], 0
    for cut in [*cuts, len(data)]:
        heard += list(decoder.feed(data[position : position + cut]))
        position += cut
    assert heard == [STEP.packed(), StepOutput(outputs=(), stats=stats(6))]


@pytest.mark.parametrize("columns", [{"request_ids": ["a", "b"]}, {"token_ids": [1]}, {"seqs": ["x"], "request_ids": ["a"]}])
def test_columns_that_do_not_fit_together_are_no_frame(columns: dict[str, list[object]]) -> None:
    body = msgspec.msgpack.encode({"outputs": [], "stats": stats(1), "plain": columns})
    frame = (len(body) + 1).to_bytes(4, "little") + bytes([FrameKind.OUTPUT]) + body
    with pytest.raises(FrameError, match="OUTPUT frame does not decode"):
        list(FrameDecoder().feed(frame))
