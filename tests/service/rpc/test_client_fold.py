"""Whatever attempts repeat, the reader sees each token once; what is missing is never passed over."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.v1 import inference_pb2
from service.contract import Delta, Reset, Started
from service.rpc.client_fold import ProtocolError, StreamFold

TOKENS = tuple(range(100, 120))
WORDS = tuple(f"<{token}>" for token in TOKENS)


def started(seed: int = 7, request_id: str = "r") -> inference_pb2.StreamEvent:
    return inference_pb2.StreamEvent(request_id=request_id, started=inference_pb2.StreamStarted(seed=seed, model="m"))


def delta(first: int, last: int, reason: int = 0, choice: int = 0) -> inference_pb2.StreamEvent:
    body = inference_pb2.Delta(
        choice=choice,
        token_ids=TOKENS[first:last],
        text="".join(WORDS[first:last]),
        text_offset=len("".join(WORDS[:first])),
        finish_reason=reason,
    )
    return inference_pb2.StreamEvent(seq=first, delta=body)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8)), max_size=40))
def test_overlapping_attempts_fold_into_one_sequence(pieces):
    fold, seen, text = StreamFold(1), [], ""
    for back, size in pieces:
        first = max(0, len(seen) - back)
        event = fold.take(delta(first, min(len(TOKENS), first + size)))
        if event is not None:
            assert (event.seq, event.text_offset) == (len(seen), len(text))
            seen.extend(event.token_ids)
            text += event.text
    assert tuple(seen) == TOKENS[: len(seen)] == fold.said[0]
    assert text == "".join(WORDS[: len(seen)])


def test_a_gap_in_tokens_is_an_error():
    fold = StreamFold(1)
    fold.take(delta(0, 2))
    with pytest.raises(ProtocolError):
        fold.take(delta(3, 4))


def test_a_gap_in_text_is_an_error():
    fold, event = StreamFold(1), delta(0, 1)
    event.delta.text_offset = 1
    with pytest.raises(ProtocolError):
        fold.take(event)


def test_a_second_attempt_is_not_announced_again_and_its_id_is_the_one_to_cancel():
    fold = StreamFold(1)
    assert isinstance(fold.take(started()), Started)
    assert fold.take(started(request_id="s")) is None
    assert fold.request_id == "s"


def test_another_seed_is_an_error():
    fold = StreamFold(1)
    fold.take(started(seed=1))
    with pytest.raises(ProtocolError):
        fold.take(started(seed=2))


def test_a_choice_that_ended_says_nothing_more():
    fold = StreamFold(1)
    assert isinstance(fold.take(delta(0, 2, inference_pb2.FinishReason.stop)), Delta)
    assert fold.take(delta(2, 4)) is None
    assert fold.said == (TOKENS[:2],)


def test_an_unknown_choice_is_an_error():
    with pytest.raises(ProtocolError):
        StreamFold(1).take(delta(0, 1, choice=1))


def test_the_result_cuts_text_after_a_stop_string():
    fold = StreamFold(1)
    fold.take(delta(0, 2))
    end = inference_pb2.ChoiceEnd(index=0, finish_reason=inference_pb2.FinishReason.stop, text_length=5)
    finished = fold.take(inference_pb2.StreamEvent(finished=inference_pb2.Finished(choices=[end], seed=7)))
    assert (finished.choices[0].text, finished.choices[0].finish_reason, finished.seed) == (WORDS[0], "stop", 7)


@pytest.mark.parametrize("kind", ["heartbeat", "reset", "failed"])
def test_what_only_the_transport_needs_is_not_shown(kind):
    event = inference_pb2.StreamEvent()
    getattr(event, kind).SetInParent()
    assert StreamFold(1).take(event) is None


def reset(*resume_from: int, epoch: int = 2) -> inference_pb2.StreamEvent:
    return inference_pb2.StreamEvent(epoch=epoch, reset=inference_pb2.Reset(resume_from=resume_from))


def test_a_reader_that_comes_back_goes_on_after_what_it_has():
    fold = StreamFold(None, [5])
    event = fold.take(delta(3, 8))
    assert (event.seq, event.token_ids) == (5, TOKENS[5:8])
    # What it has read of the text is not known here: the first delta says where the text begins.
    assert (event.text, event.text_offset) == ("".join(WORDS[3:8]), len("".join(WORDS[:3])))
    assert fold.counts == (8,)


def test_a_reader_tells_how_much_text_it_has_once_it_knows():
    fold = StreamFold(None, [5, 0])
    assert fold.text_counts == (-1, 0)
    fold.take(delta(5, 8))
    assert fold.text_counts == (len("".join(WORDS[:8])), 0)
    fold.take(reset(6, 0))
    # Where its text is to be cut only the next delta tells.
    assert fold.text_counts == (0, 0)


def test_choices_that_nobody_counted_come_as_they_are():
    fold = StreamFold(None)
    fold.take(delta(0, 2, choice=3))
    assert fold.counts == (0, 0, 0, 2)
    with pytest.raises(ProtocolError):
        fold.take(delta(0, 1, choice=16))


def test_a_hand_over_that_voids_nothing_is_not_shown():
    fold = StreamFold(1)
    fold.take(delta(0, 4))
    assert fold.take(reset(4)) is None
    assert fold.counts == (4,)


def test_what_a_new_owner_says_instead_takes_the_place_of_what_was_seen():
    fold = StreamFold(1)
    fold.take(delta(0, 4))
    assert fold.take(reset(2)) == Reset(epoch=2, resume_from=(2,))
    other = inference_pb2.Delta(token_ids=[7, 8], text="other", text_offset=len("".join(WORDS[:2])))
    event = fold.take(inference_pb2.StreamEvent(seq=2, delta=other))
    assert (event.seq, event.token_ids, event.text) == (2, (7, 8), "other")
    end = inference_pb2.ChoiceEnd(index=0, finish_reason=inference_pb2.FinishReason.stop, text_length=100)
    finished = fold.take(inference_pb2.StreamEvent(finished=inference_pb2.Finished(choices=[end])))
    assert (finished.choices[0].text, finished.choices[0].token_ids) == ("".join(WORDS[:2]) + "other", (*TOKENS[:2], 7, 8))
