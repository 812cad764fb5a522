"""What waits is merged, bounded and leaves in order."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from service.contract import Delta, LogprobEntry, Started
from service.rpc.outbox import Outbox

STARTED = Started(request_id="r", model="m", seed=1, prompt_tokens=2, trace_id="")


def delta(choice: int, seq: int, text: str = "ab", **fields) -> Delta:
    return Delta(choice=choice, seq=seq, token_ids=(seq,), text=text, text_offset=seq * len(text), **fields)


@given(st.lists(st.one_of(st.integers(0, 2), st.none()), max_size=60))
def test_whenever_it_is_taken_from_each_choice_comes_out_whole_and_in_order(steps):
    outbox, put, got = Outbox(10_000), [0, 0, 0], ["", "", ""]
    seen: list[list[int]] = [[], [], []]
    for choice in [*steps, None]:
        if choice is not None:
            outbox.put(delta(choice, put[choice]))
            put[choice] += 1
            continue
        for event in outbox.take():
            assert event.seq == len(seen[event.choice])
            assert event.text_offset == len(got[event.choice])
            seen[event.choice].extend(event.token_ids)
            got[event.choice] += event.text
        outbox.sent()
    assert seen == [list(range(count)) for count in put]
    assert got == ["ab" * count for count in put]
    assert outbox.num_bytes == 0


def test_at_most_one_delta_a_choice_waits():
    outbox = Outbox(10_000)
    for seq in range(50):
        outbox.put(delta(seq % 2, seq // 2))
    assert [event.choice for event in outbox.take()] == [0, 1]
    assert outbox.num_merges == 48


def test_started_leaves_first():
    outbox = Outbox(10_000)
    outbox.put(STARTED)
    outbox.put(delta(0, 0))
    assert outbox.take()[0] is STARTED


def test_merging_keeps_logprobs_and_the_finish_reason():
    outbox, entry = Outbox(10_000), LogprobEntry(token_id=1, token="a", logprob=-1.0)
    outbox.put(delta(0, 0, logprobs=(entry,)))
    outbox.put(delta(0, 1, logprobs=(entry,), finish_reason="stop"))
    (merged,) = outbox.take()
    assert (merged.logprobs, merged.finish_reason) == ((entry, entry), "stop")


async def test_the_filler_waits_at_the_bound_until_what_was_taken_is_sent():
    outbox = Outbox(100)
    outbox.put(delta(0, 0, text="x" * 100))
    waiting = asyncio.ensure_future(outbox.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    outbox.take()
    await asyncio.sleep(0)
    assert not waiting.done()
    outbox.sent()
    await asyncio.wait_for(waiting, 5)


async def test_only_a_choices_first_token_is_urgent():
    outbox = Outbox(10_000)
    outbox.put(delta(0, 0))
    await asyncio.wait_for(outbox.wait_urgent(), 5)
    outbox.take()
    outbox.put(delta(0, 1))
    urgent = asyncio.ensure_future(outbox.wait_urgent())
    await asyncio.wait_for(outbox.wait(), 5)
    assert not urgent.done()
    outbox.put(delta(1, 0))
    await asyncio.wait_for(urgent, 5)


async def test_the_first_reason_to_close_counts_and_wakes_the_taker():
    outbox, first = Outbox(100), ValueError("first")
    outbox.close(first)
    outbox.close(ValueError("second"))
    await asyncio.wait_for(outbox.wait(), 5)
    assert outbox.error is first
