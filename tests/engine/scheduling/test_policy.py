"""Who is served first and who gives way."""

from engine.scheduling.policy import MAX_PREEMPTIONS, fcfs, pick_victim, priority
from engine.scheduling.sequence import Sequence
from tests.engine.scheduling.harness import request


def make_running(count: int) -> list[Sequence]:
    return [Sequence(request(f"r{i}"), 0, i, (0, i), (), 0) for i in range(count)]


def test_fcfs_ignores_priority() -> None:
    assert fcfs(-5, 1) > fcfs(9, 0)


def test_priority_serves_the_lower_number_then_the_earlier_arrival() -> None:
    assert sorted([priority(1, 0), priority(0, 2), priority(0, 1)]) == [(0, 1), (0, 2), (1, 0)]


def test_the_last_in_order_gives_way() -> None:
    running = make_running(3)
    assert pick_victim(running, running[1], running[0]) is running[2]


def test_nobody_takes_from_those_before_it() -> None:
    running = make_running(3)
    assert pick_victim(running, running[2], running[0]) is None


def test_the_oldest_takes_from_those_before_it() -> None:
    running = make_running(3)
    assert pick_victim(running, running[2], running[2]) is running[1]


def test_the_oldest_never_gives_way() -> None:
    running = make_running(2)
    assert pick_victim(running, running[0], running[1]) is None


def test_who_was_preempted_sixteen_times_never_gives_way_again() -> None:
    running = make_running(3)
    running[2].num_preemptions = MAX_PREEMPTIONS
    assert pick_victim(running, running[0], running[0]) is running[1]


def test_who_already_runs_in_this_step_does_not_give_way() -> None:
    running = make_running(3)
    running[2].num_scheduled_tokens = 1
    assert pick_victim(running, running[0], running[0]) is running[1]
