"""Who enters and when: bounds, refusals, turns, and room that comes back exactly once."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from service.admission import Admission, Ticket
from service.config import AdmissionSection
from service.errors import RequestError


class Clock:
    def __init__(self) -> None:
        self.now_ns = 1_000_000_000

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, seconds: float) -> None:
        self.now_ns += int(seconds * 1e9)


def admission(clock: Clock | None = None, *, requests: int = 100, tokens: int = 1000, concurrency: int = 64) -> Admission:
    section = AdmissionSection(max_requests=requests, max_tokens=tokens)
    return Admission(section, concurrency=concurrency, clock=clock or Clock())


async def settle(*coroutines: Coroutine[Any, Any, Ticket]) -> list[asyncio.Task[Ticket]]:
    """Starts them in order and lets each reach its wait."""
    tasks = []
    for coroutine in coroutines:
        tasks.append(asyncio.create_task(coroutine))
        await asyncio.wait(tasks[-1:], timeout=0.01)
    return tasks


async def refused(coroutine: Coroutine[Any, Any, Ticket]) -> RequestError:
    with pytest.raises(RequestError) as raised:
        await coroutine
    return raised.value


async def test_room_is_given_back_exactly_once() -> None:
    intake = admission()
    ticket = await intake.enter("a", "", 600)
    assert (intake.num_requests, intake.num_tokens) == (1, 600)
    ticket.release()
    ticket.release()
    assert (intake.num_requests, intake.num_tokens) == (0, 0)


async def test_a_full_intake_refuses_a_direct_call_with_a_time_to_come_back() -> None:
    intake = admission()
    await intake.enter("a", "", 600)
    error = await refused(intake.enter("b", "", 600))
    assert error.code == "overloaded"
    assert error.retry_after_s > 0


async def test_the_number_of_requests_is_bounded_too() -> None:
    intake = admission(requests=1)
    await intake.enter("a", "", 1)
    assert (await refused(intake.enter("b", "", 1))).code == "overloaded"


async def test_what_can_never_fit_is_refused_and_not_kept_waiting() -> None:
    assert (await refused(admission().enter("a", "", 1001, waits=True))).code == "too_many_tokens"


async def test_the_time_to_come_back_follows_how_long_those_that_ended_stayed() -> None:
    clock = Clock()
    intake = admission(clock)
    first, second = await intake.enter("a", "", 500), await intake.enter("b", "", 500)
    clock.advance(2.0)
    first.release()
    second.release()
    await intake.enter("c", "", 500)
    await intake.enter("d", "", 500)
    # Each of two stays for 2 s: half of what they hold comes back in one.
    error = await refused(intake.enter("e", "", 500))
    assert error.retry_after_s == pytest.approx(1.0)


async def in_waves(clock: Clock, *, wave: int, stay_s: float, into_second_s: float) -> Admission:
    """An intake `into_second_s` after the second of two waves of `wave` requests entered, each of which stays for `stay_s`."""
    intake = admission(clock, requests=4 * wave, tokens=1_000_000)
    tickets = [await intake.enter(f"a{number}", "", 100) for number in range(wave)]
    clock.advance(stay_s)
    for ticket in tickets:
        ticket.release()
    for number in range(wave):
        await intake.enter(f"b{number}", "", 100)
        # Whoever asks meanwhile does not change the measure.
        intake.estimated_wait_s(100)
    clock.advance(into_second_s)
    return intake


async def test_time_in_which_nothing_ends_does_not_refuse_a_prompt_that_could_make_it() -> None:
    clock = Clock()
    intake = await in_waves(clock, wave=64, stay_s=136.0, into_second_s=100.0)
    ticket = await intake.enter("late", "", 100, deadline_ns=clock.now_ns + 300_000_000_000)
    assert ticket.tokens == 100


async def test_a_first_short_stay_does_not_refuse_those_that_come_while_long_ones_run() -> None:
    clock = Clock()
    intake = admission(clock, tokens=1_000_000)
    short = await intake.enter("short", "", 100)
    for number in range(64):
        await intake.enter(f"a{number}", "", 100)
    clock.advance(10.0)
    short.release()
    clock.advance(90.0)
    assert intake.estimated_wait_s(100) <= 46.0


async def test_a_prompt_whose_deadline_passes_before_its_wave_is_refused_however_long_nothing_ended() -> None:
    clock = Clock()
    intake = await in_waves(clock, wave=64, stay_s=136.0, into_second_s=100.0)
    for number in range(64):
        await intake.enter(f"c{number}", "", 100)
    error = await refused(intake.enter("hopeless", "", 100, deadline_ns=clock.now_ns + 20_000_000_000))
    assert error.code == "deadline_exceeded"


async def test_a_burst_behind_light_load_is_measured_by_what_the_engine_runs_at_once() -> None:
    clock = Clock()
    intake = admission(clock, requests=400, tokens=1_000_000, concurrency=64)
    for _ in range(10):
        tickets = [await intake.enter("light", "", 100) for _ in range(16)]
        clock.advance(2.0)
        for ticket in tickets:
            ticket.release()
    for _ in range(256):
        await intake.enter("burst", "", 100)
    # 193 before it, of which 64 leave every two seconds.
    assert intake.estimated_wait_s(100) == pytest.approx(6.0, abs=0.1)


async def test_large_prompts_behind_a_small_one_are_counted_in_turns_of_the_intake_not_of_the_small_one() -> None:
    clock = Clock()
    intake = admission(clock, tokens=1000)
    ticket = await intake.enter("a", "", 10)
    clock.advance(2.0)
    ticket.release()
    await intake.enter("small", "", 10)
    (waiter,) = await settle(intake.enter("large", "", 870, waits=True))
    assert intake.estimated_wait_s(300) == pytest.approx(2.0 * (1 + 170 / 1000))
    waiter.cancel()


@pytest.mark.parametrize("waits", [False, True])
async def test_an_estimated_wait_beyond_the_deadline_is_refused_at_once(waits: bool) -> None:
    clock = Clock()
    intake = admission(clock)
    ticket = await intake.enter("a", "", 800)
    clock.advance(10.0)
    ticket.release()
    await intake.enter("b", "", 800)
    error = await refused(intake.enter("c", "", 800, deadline_ns=clock.now_ns + 1_000_000_000, waits=waits))
    assert error.code == "deadline_exceeded"


async def test_requests_that_wait_inside_the_engine_count_for_the_deadline() -> None:
    clock = Clock()
    intake = admission(clock, concurrency=1)
    ticket = await intake.enter("a", "", 100)
    clock.advance(5.0)
    ticket.release()
    await intake.enter("b", "", 100)
    error = await refused(intake.enter("c", "", 100, deadline_ns=clock.now_ns + 1_000_000_000))
    assert error.code == "deadline_exceeded"


async def test_those_who_wait_enter_in_order_and_tenants_in_turn() -> None:
    intake = admission(requests=8)
    tickets = [await intake.enter(f"t{number}", "", 1) for number in range(8)]
    names = [("a1", "A"), ("a2", "A"), ("a3", "A"), ("b1", "B")]
    entered: list[str] = []

    async def wait(name: str, tenant: str) -> Ticket:
        ticket = await intake.enter(name, tenant, 1, waits=True)
        entered.append(name)
        return ticket

    tasks = await settle(*(wait(name, tenant) for name, tenant in names))
    for ticket in tickets:
        ticket.release()
    await asyncio.gather(*tasks)
    assert entered == ["a1", "b1", "a2", "a3"]
    assert intake.num_waiting == 0


async def entered_order(tokens: int, lines: dict[str, tuple[int, int, int]]) -> list[str]:
    """Who enters, in order, where room for one comes free at a time. `lines`: tenant -> (prompts, tokens of each, weight)."""
    intake = admission(requests=1_000, tokens=tokens)
    first = await intake.enter("first", "", int(tokens * 0.875))
    order: list[str] = []

    async def wait(tenant: str, number: int, cost: int, weight: int) -> None:
        ticket = await intake.enter(f"{tenant}{number}", tenant, cost, waits=True, weight=weight)
        order.append(tenant)
        ticket.release()

    waiting = await settle(
        *(wait(tenant, number, cost, weight) for tenant, (count, cost, weight) in lines.items() for number in range(count))
    )
    first.release()
    await asyncio.gather(*waiting)
    return order


async def test_a_tenant_of_large_prompts_gets_no_more_tokens_than_one_of_small_ones() -> None:
    order = await entered_order(100, {"large": (10, 80, 1), "small": (80, 10, 1)})
    eighth = len([name for name in order[: order.index("large", order.index("large") + 1)] if name == "small"])
    assert 7 <= eighth <= 17
    half = order[: len(order) // 2]
    assert abs(half.count("large") * 80 - half.count("small") * 10) <= 80


async def test_many_prompts_of_one_tenant_do_not_hold_up_another() -> None:
    order = await entered_order(100, {"many": (100, 10, 1), "few": (3, 10, 1)})
    assert [place for place, name in enumerate(order) if name == "few"] == [1, 3, 5]


async def test_room_is_shared_by_weight() -> None:
    order = await entered_order(100, {"batch": (90, 10, 1), "interactive": (90, 10, 8)})
    assert 7 <= order[:45].count("interactive") / order[:45].count("batch") <= 9


async def test_no_one_overtakes_a_large_prompt_at_the_head_of_the_line() -> None:
    intake = admission()
    first = await intake.enter("a", "", 500)
    large, small = await settle(intake.enter("large", "", 800, waits=True), intake.enter("small", "", 10, waits=True))
    assert (large.done(), small.done()) == (False, False)
    first.release()
    assert [ticket.tokens for ticket in await asyncio.gather(large, small)] == [800, 10]


async def test_a_backlog_of_waiting_prompts_leaves_room_for_direct_calls() -> None:
    intake = admission()
    await settle(*(intake.enter(f"w{number}", "", 100, waits=True) for number in range(12)))
    assert intake.num_waiting > 0
    assert (await intake.enter("direct", "", 100)).tokens == 100


async def test_a_cancelled_wait_leaves_the_line() -> None:
    intake = admission()
    first = await intake.enter("a", "", 800)
    (task,) = await settle(intake.enter("b", "", 800, waits=True))
    assert intake.cancel("b")
    assert (await refused(task)).code == "cancelled"  # type: ignore[arg-type]
    assert not intake.cancel("b")
    first.release()
    assert (intake.num_waiting, intake.num_requests) == (0, 0)


async def test_a_waiter_that_goes_away_gives_its_turn_to_the_next() -> None:
    intake = admission()
    first = await intake.enter("a", "", 800)
    gone, stays = await settle(intake.enter("b", "", 800, waits=True), intake.enter("c", "", 800, waits=True))
    # Its turn comes in the same moment as its end: the room must not be lost.
    first.release()
    gone.cancel()
    assert (await stays).tokens == 800
    assert intake.num_requests == 1


async def test_a_deadline_that_passes_in_the_line_ends_the_wait() -> None:
    clock = Clock()
    intake = admission(clock)
    await intake.enter("a", "", 800)
    error = await refused(intake.enter("b", "", 800, deadline_ns=clock.now_ns + 10_000_000, waits=True))
    assert (error.code, intake.num_waiting) == ("deadline_exceeded", 0)


async def test_draining_refuses_newcomers_and_those_who_wait() -> None:
    intake = admission()
    await intake.enter("a", "", 800)
    (task,) = await settle(intake.enter("b", "", 800, waits=True))
    intake.drain()
    assert (await refused(task)).code == "draining"  # type: ignore[arg-type]
    assert (await refused(intake.enter("c", "", 1))).code == "draining"
