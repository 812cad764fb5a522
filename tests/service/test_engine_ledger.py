"""The ledger alone: exactly-once tokens, and whose fault a death is."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import PlainTokens, Request, SamplingParams, StepOutput, TokenOutput
from engine.errors import FrameError
from service.engine_ledger import MAX_DEATHS, EngineLedger
from tests.service.fake_engine import stats


def request(request_id: str, n: int = 1) -> Request:
    return Request(request_id=request_id, prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=50, seed=1, n=n))


def token(request_id: str, seq: int, *ids: int, choice: int = 0, finish: bool = False) -> TokenOutput:
    return TokenOutput(request_id=request_id, choice=choice, seq=seq, token_ids=ids, finish_reason="length" if finish else None)


def accept(ledger: EngineLedger, *outputs: TokenOutput) -> tuple[TokenOutput, ...]:
    """As a child's frame says them: single tokens in columns."""
    return ledger.accept(StepOutput(outputs=outputs, stats=stats(1)).packed()).every()


def taken(ledger: EngineLedger) -> list[str]:
    return [item.request_id for item in ledger.take()]


def ledger_with(*ids: str) -> EngineLedger:
    ledger = EngineLedger(1000)
    for request_id in ids:
        ledger.add(request(request_id))
    return ledger


def test_requests_enter_in_order_of_arrival_and_once() -> None:
    ledger = ledger_with("a", "b")
    assert taken(ledger) == ["a", "b"]
    assert taken(ledger) == []


def test_no_more_enters_than_the_child_holds() -> None:
    ledger = EngineLedger(4)
    for request_id, n in (("a", 3), ("b", 2), ("c", 1)):
        ledger.add(request(request_id, n))
    assert taken(ledger) == ["a"]
    accept(ledger, token("a", 0, 5, finish=True))
    assert taken(ledger) == ["b"]
    accept(ledger, *(token("b", 0, 5, choice=choice, finish=True) for choice in range(2)))
    assert taken(ledger) == ["c"]
    ledger.child_died()
    assert taken(ledger) == ["a"]
    ledger.end_one("a", "prompt_too_long", "")
    assert taken(ledger) == ["c"]


def test_one_request_alone_enters_however_many_choices_it_has() -> None:
    ledger = EngineLedger(4)
    ledger.add(request("a", 16))
    assert taken(ledger) == ["a"]


def test_an_outstanding_id_is_refused() -> None:
    with pytest.raises(ValueError, match="outstanding"):
        ledger_with("a", "a")


def test_what_was_said_goes_to_the_next_child() -> None:
    ledger = EngineLedger(1000)
    ledger.add(request("a", n=2))
    ledger.take()
    accept(ledger, token("a", 0, 5, 6), token("a", 0, 7, choice=1, finish=True))
    assert ledger.child_died() == ()
    (again,) = ledger.take()
    assert (again.output_token_ids, again.ended_choices) == (((5, 6), (7,)), (1,))


def test_a_step_that_skips_a_token_takes_nothing_of_its_other_outputs() -> None:
    ledger = ledger_with("a", "b")
    ledger.take()
    with pytest.raises(FrameError):
        accept(ledger, token("a", 0, 5, finish=True), token("b", 3, 6))
    ledger.child_died()
    assert len(ledger) == 2
    (again,) = ledger.take()
    assert again.output_token_ids == ()


@pytest.mark.parametrize(
    ("seq", "ids", "expected"), [(0, (5, 6, 7), (7,)), (1, (6, 7), (7,)), (2, (7,), (7,)), (0, (5, 6), None)]
)
def test_tokens_that_were_said_are_not_said_again(seq: int, ids: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
    ledger = ledger_with("a")
    ledger.take()
    accept(ledger, token("a", 0, 5, 6))
    accepted = accept(ledger, token("a", seq, *ids))
    assert [(output.seq, output.token_ids) for output in accepted] == ([] if expected is None else [(2, expected)])


def test_a_skipped_token_is_a_broken_child() -> None:
    ledger = ledger_with("a")
    ledger.take()
    with pytest.raises(FrameError, match="starts at token 3"):
        accept(ledger, token("a", 3, 5))


def test_suspects_enter_one_at_a_time_until_each_has_moved() -> None:
    ledger = ledger_with("a", "b")
    ledger.take()
    ledger.child_died()
    ledger.add(request("new"))
    assert taken(ledger) == ["a"]
    assert taken(ledger) == []
    accept(ledger, token("a", 0, 5))
    assert taken(ledger) == ["b"]
    accept(ledger, token("b", 0, 5))
    assert taken(ledger) == ["new"]


def test_dying_alone_under_suspicion_is_a_crash_loop() -> None:
    ledger = ledger_with("a", "b")
    ledger.take()
    ledger.child_died()
    ledger.take()
    assert [(end.request_id, end.error_code) for end in ledger.child_died()] == [("a", "crash_loop")]
    assert taken(ledger) == ["b"]


def test_progress_between_deaths_clears_but_not_for_ever() -> None:
    ledger = ledger_with("a")
    for death in range(1, MAX_DEATHS):
        ledger.take()
        accept(ledger, token("a", death - 1, 5))
        assert ledger.child_died() == ()
    ledger.take()
    accept(ledger, token("a", MAX_DEATHS - 1, 5))
    assert [end.error_code for end in ledger.child_died()] == ["crash_loop"]


def test_a_choice_that_has_not_moved_keeps_its_request_under_suspicion() -> None:
    ledger = EngineLedger(1000)
    ledger.add(request("a", n=2))
    ledger.add(request("b"))
    ledger.take()
    ledger.child_died()
    ledger.take()
    accept(ledger, token("a", 0, 5))
    assert taken(ledger) == []
    accept(ledger, token("a", 0, 5, choice=1))
    assert taken(ledger) == ["b"]


def test_an_abort_outside_the_child_ends_here_and_inside_goes_to_it_once() -> None:
    ledger = ledger_with("a")
    ledger.take()
    ledger.add(request("b"))
    assert ledger.abort("a") == (True, ())
    assert ledger.abort("a") == (False, ())
    told, ends = ledger.abort("b")
    assert (told, [end.finish_reason for end in ends]) == (False, ["cancelled"])
    assert ledger.abort("unknown") == (False, ())


def test_an_aborted_request_does_not_come_back_after_a_death() -> None:
    ledger = ledger_with("a")
    ledger.take()
    ledger.abort("a")
    assert [end.finish_reason for end in ledger.child_died()] == ["cancelled"]
    assert len(ledger) == 0


def plain(*entries: tuple[str, int, int, int]) -> StepOutput:
    request_ids, choices, seqs, token_ids = zip(*entries, strict=True)
    columns = PlainTokens(request_ids=request_ids, choices=choices, seqs=seqs, token_ids=token_ids)
    return StepOutput(outputs=(), stats=stats(1), plain=columns)


def test_a_step_of_which_all_is_new_is_handed_on_as_it_is() -> None:
    ledger = ledger_with("a", "b")
    ledger.take()
    step = plain(("a", 0, 0, 5), ("b", 0, 0, 6))
    assert ledger.accept(step) is step
    ledger.child_died()
    assert [item.output_token_ids for item in ledger.take()] == [((5,),)]


def test_columns_are_trusted_no_more_than_objects() -> None:
    ledger = ledger_with("a", "b")
    ledger.take()
    with pytest.raises(FrameError, match="choice 1"):
        ledger.accept(plain(("b", 0, 0, 5), ("a", 1, 0, 5)))
    with pytest.raises(FrameError, match="starts at token 1"):
        ledger.accept(plain(("b", 0, 0, 5), ("a", 0, 1, 5)))
    accepted = ledger.accept(plain(("b", 0, 0, 5), ("a", 0, 0, 6), ("a", 0, 0, 6), ("a", 0, 1, 7), ("gone", 0, 0, 8)))
    assert [(output.request_id, output.seq, output.token_ids) for output in accepted.every()] == [
        ("b", 0, (5,)), ("a", 0, (6,)), ("a", 1, (7,)),
    ]  # fmt: skip


def test_nothing_is_added_to_a_choice_that_has_ended() -> None:
    ledger = EngineLedger(1000)
    ledger.add(request("a", n=2))
    ledger.take()
    accept(ledger, token("a", 0, 5, finish=True))
    assert ledger.accept(plain(("a", 0, 1, 6), ("a", 1, 0, 7))).every() == (token("a", 0, 7, choice=1),)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_whatever_dies_every_choice_is_said_once_in_order_and_ends_once(data: st.DataObject) -> None:
    lengths = {f"r{number}": data.draw(st.integers(1, 6)) for number in range(data.draw(st.integers(1, 5)))}
    ledger, said, ends = ledger_with(*lengths), {key: [] for key in lengths}, dict.fromkeys(lengths, 0)
    child: dict[str, int] = {}

    def hand_on(outputs: tuple[TokenOutput, ...]) -> None:
        for output in outputs:
            assert ends[output.request_id] == 0
            assert output.seq == len(said[output.request_id])
            said[output.request_id] += output.token_ids
            ends[output.request_id] += output.finish_reason is not None

    for _ in range(200):
        for item in ledger.take():
            child[item.request_id] = len(item.output_token_ids[0]) if item.output_token_ids else 0
        if not len(ledger):
            break
        if data.draw(st.integers(0, 9)) == 0:
            hand_on(ledger.child_died())
            child.clear()
        elif child:
            outputs = []
            for request_id in data.draw(st.lists(st.sampled_from(sorted(child)), min_size=1, max_size=4, unique=True)):
                position = child[request_id]
                last = position + 1 == lengths[request_id]
                # Sometimes the child repeats what it said: the ledger must not.
                start = data.draw(st.sampled_from([position, 0]))
                outputs.append(token(request_id, start, *range(start, position + 1), finish=last))
                child[request_id] += 1
                if last:
                    del child[request_id]
            hand_on(accept(ledger, *outputs))
    hand_on(ledger.end_all("engine_failed", ""))
    assert ends == dict.fromkeys(lengths, 1)
    assert all(tokens == list(range(len(tokens))) for tokens in said.values())
