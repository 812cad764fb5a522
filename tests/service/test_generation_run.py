"""Outputs that came between two wake-ups are taken as one."""

from engine import TokenLogprobs, TokenOutput
from service.generation_run import joined
from service.streams import Signal
from tests.service.fake_engine import facts


def output(seq: int, choice: int = 0, **fields: object) -> TokenOutput:
    return TokenOutput(request_id="r", choice=choice, seq=seq, token_ids=(seq,), **fields)  # type: ignore[arg-type]


def test_tokens_of_one_choice_that_follow_one_another_become_one_output() -> None:
    (one,) = joined([output(3), output(4), output(5)])
    assert one == TokenOutput(request_id="r", choice=0, seq=3, token_ids=(3, 4, 5))


def test_whatever_says_more_than_its_tokens_stays_by_itself_and_in_its_place() -> None:
    alone = [
        output(0, facts=facts(1, 1, 1)),
        Signal("cancelled"),
        output(3, logprobs=(TokenLogprobs(token_id=3, logprob=-1.0),)),
        output(6, finish_reason="length"),
    ]
    items = [alone[0], output(1), output(2), alone[1], alone[2], output(4), output(5), alone[3]]
    assert joined(items) == [
        alone[0],
        TokenOutput(request_id="r", choice=0, seq=1, token_ids=(1, 2)),
        *alone[1:3],
        TokenOutput(request_id="r", choice=0, seq=4, token_ids=(4, 5)),
        alone[3],
    ]


def test_choices_are_never_mixed() -> None:
    items = [output(1, choice=0), output(1, choice=1), output(2, choice=0)]
    assert joined(items) == items


def test_nothing_stays_nothing() -> None:
    assert joined([]) == []
