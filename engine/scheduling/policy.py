"""Who runs next, and who gives way.

A policy is a function from (priority, arrival) to a key; sequences are served in ascending key, and give up their blocks in
descending key. Keys are unique because arrivals are. Guarantees: order is a pure function of arrival and priority (I3).
A new policy is one function here and its name in `POLICIES`. Knows no blocks and no budgets.
"""

from collections.abc import Callable, Sequence

from engine.scheduling.sequence import Sequence as Seq

MAX_PREEMPTIONS = 16
"""A sequence that was preempted so often is let in only with all blocks that it can ever need, and never gives way again."""

Key = tuple[int, int]


def fcfs(priority: int, arrival: int) -> Key:
    """By arrival alone."""
    return (0, arrival)


def priority(priority: int, arrival: int) -> Key:
    """By priority, lower first; then by arrival."""
    return (priority, arrival)


POLICIES: dict[str, Callable[[int, int], Key]] = {"fcfs": fcfs, "priority": priority}


def pick_victim(running: Sequence[Seq], asking: Seq, oldest: Seq) -> Seq | None:
    """The last sequence in policy order that may be preempted so that `asking` can grow, or None.

    Never the oldest, never one that holds all it needs (`MAX_PREEMPTIONS`), never one that this step already runs. Only the
    oldest may take from sequences that stand before it.
    """
    for sequence in reversed(running):
        if sequence is asking:
            if asking is not oldest:
                return None
        elif sequence is not oldest and not sequence.num_scheduled_tokens and sequence.num_preemptions < MAX_PREEMPTIONS:
            return sequence
    return None
