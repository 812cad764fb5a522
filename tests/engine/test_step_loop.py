"""Steps without memory: retried once, then the largest request alone is failed; budgets shrink and recover."""

import itertools

import pytest

from engine.errors import OutOfMemoryError
from engine.output import TokenOutput
from engine.request import Request, SamplingParams
from engine.scheduling.config import SchedulerConfig
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step import ChunkResult, Follow, StepPlan, StepResult
from engine.step_loop import CALM_STEPS, StepLoop


class TightExecutor:
    """Says position numbers; a step of more than `limit` tokens, or that holds `poison` tokens of context, does not fit."""

    def __init__(self, limit: int = 10**9, poison: int = 10**9, *, overlaps: bool = False, follow: Follow = "anything") -> None:
        self.limit = limit
        self.poison = poison
        self.follow: Follow = follow if overlaps else "nothing"
        self.under_way: list[StepPlan] = []
        self.most_under_way = 0
        self.num_refused = 0
        self.num_released = 0

    def launch(self, plan: StepPlan) -> StepPlan:
        longest = max((chunk.start + chunk.num_tokens for chunk in plan.chunks), default=0)
        if plan.num_tokens > self.limit or longest > self.poison:
            self.num_refused += 1
            raise OutOfMemoryError("no memory")
        self.under_way.append(plan)
        self.most_under_way = max(self.most_under_way, len(self.under_way))
        return plan

    def may_follow(self, launched: StepPlan) -> Follow:
        return self.follow

    def collect(self, plan: StepPlan) -> StepResult:
        assert self.under_way.pop(0) is plan
        return StepResult(
            chunks=tuple(
                ChunkResult(token_ids=(chunk.start + chunk.num_tokens,) if chunk.samples else ()) for chunk in plan.chunks
            )
        )

    def release_memory(self) -> None:
        self.num_released += 1


def _loop(executor: TightExecutor, budget: int = 64) -> tuple[StepLoop, Scheduler]:
    config = SchedulerConfig(
        num_blocks=200,
        block_size=4,
        max_num_seqs=8,
        max_num_waiting=16,
        max_num_batched_tokens=budget,
        max_model_len=400,
    )
    scheduler = Scheduler(config)
    clock = itertools.count(1)
    return StepLoop(scheduler, executor, lambda: next(clock)), scheduler


def _ask(name: str, prompt: int, max_tokens: int = 4) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, seed=0, ignore_eos=True)
    return Request(request_id=name, prompt_token_ids=tuple(range(1, prompt + 1)), sampling=sampling)


@pytest.fixture(params=[False, True], ids=["in turns", "ahead"])
def overlaps(request: pytest.FixtureRequest) -> bool:
    """Whether steps are launched before the one before is collected."""
    return bool(request.param)


def _finish(loop: StepLoop, max_steps: int = 2000) -> dict[str, list[TokenOutput]]:
    heard: dict[str, list[TokenOutput]] = {}
    for _ in range(max_steps):
        if not loop.has_work:
            return heard
        for output in loop.step().every():
            heard.setdefault(output.request_id, []).append(output)
    raise AssertionError("work left")


def _tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_a_step_that_does_not_fit_is_retried_smaller(overlaps: bool) -> None:
    """Half the budget fits: nobody is failed, everybody says what they say with enough memory."""
    plain = _finish(_filled(_loop(TightExecutor())[0]))
    executor = TightExecutor(limit=32, overlaps=overlaps)
    loop, scheduler = _loop(executor)
    heard = _finish(_filled(loop))
    assert {name: _tokens(outputs) for name, outputs in heard.items()} == {n: _tokens(o) for n, o in plain.items()}
    assert {outputs[-1].finish_reason for outputs in heard.values()} == {"length"}
    assert (executor.num_refused, executor.num_released, scheduler.token_budget) == (1, 1, 32)


def _filled(loop: StepLoop) -> StepLoop:
    for name, prompt in (("a", 10), ("b", 30), ("c", 50)):
        loop.add(_ask(name, prompt))
    return loop


def test_only_the_largest_request_fails_when_a_retry_does_not_help(overlaps: bool) -> None:
    """A context that never fits ends with `out_of_memory`; the others finish with their own tokens."""
    plain = _finish(_filled(_loop(TightExecutor())[0]))
    loop, _ = _loop(TightExecutor(poison=40, overlaps=overlaps), budget=128)
    heard = _finish(_filled(loop))
    assert (heard["c"][-1].finish_reason, heard["c"][-1].error_code) == ("error", "out_of_memory")
    assert [_tokens(heard[name]) for name in "ab"] == [_tokens(plain[name]) for name in "ab"]


def test_each_request_ends_when_nothing_fits(overlaps: bool) -> None:
    """A device without any memory fails them all, one by one, and the loop comes to rest."""
    loop, scheduler = _loop(TightExecutor(limit=0, overlaps=overlaps))
    heard = _finish(_filled(loop))
    assert sorted((name, outputs[-1].error_code) for name, outputs in heard.items()) == [
        ("a", "out_of_memory"),
        ("b", "out_of_memory"),
        ("c", "out_of_memory"),
    ]
    assert scheduler.stats().num_used_blocks == 0


def test_the_budget_comes_back_after_calm_steps(overlaps: bool) -> None:
    """`CALM_STEPS` steps that fit double the budget again, up to the configured one."""
    loop, scheduler = _loop(TightExecutor(limit=32, overlaps=overlaps))
    loop.add(_ask("a", 60, max_tokens=300))
    loop.step()
    assert scheduler.token_budget == 32
    for _ in range(CALM_STEPS + 2):
        loop.step()
    assert scheduler.token_budget == 64


def test_the_prefix_cache_is_dropped_with_the_first_refusal() -> None:
    """What only speeds up goes first: no evictable block is left."""
    executor = TightExecutor()
    loop, scheduler = _loop(executor)
    loop.add(_ask("a", 20))
    _finish(loop)
    assert scheduler.stats().num_evictable_blocks > 0
    executor.limit = 16
    loop.add(_ask("z", 40))
    loop.step()
    assert scheduler.stats().num_evictable_blocks == 0


def test_a_steps_counts_are_those_of_the_step_alone() -> None:
    loop, scheduler = _loop(TightExecutor(limit=64))
    loop.add(_ask("first", prompt=24, max_tokens=8))
    queried = [loop.step().stats.num_prefix_query_tokens for _ in range(4)]
    assert queried == [24, 0, 0, 0]
    assert scheduler.stats().num_prefix_query_tokens == 24


def test_the_step_after_is_launched_before_a_step_is_collected(overlaps: bool) -> None:
    """What is said is the same; two steps are under way at most, and none once all has been said."""
    plain = _finish(_filled(_loop(TightExecutor())[0]))
    executor = TightExecutor(overlaps=overlaps)
    loop, scheduler = _loop(executor)
    heard = _finish(_filled(loop))
    assert {name: _tokens(outputs) for name, outputs in heard.items()} == {n: _tokens(o) for n, o in plain.items()}
    assert (executor.most_under_way, executor.under_way) == (1 + overlaps, [])
    assert scheduler.stats().num_used_blocks == 0


class NoRoomAhead(TightExecutor):
    """Has memory for one step, and none for another beside it."""

    def __init__(self) -> None:
        super().__init__(overlaps=True)
        self.refuses = True

    def launch(self, plan: StepPlan) -> StepPlan:
        self.limit = 0 if self.under_way and self.refuses else 10**9
        return super().launch(plan)


def test_without_memory_for_two_steps_they_run_in_turns_for_a_while() -> None:
    """Nobody is failed, the budget stays, and after `CALM_STEPS` steps the next is launched ahead again."""
    plain = _finish(_filled(_loop(TightExecutor())[0]))
    executor = NoRoomAhead()
    loop, scheduler = _loop(executor)
    heard = _finish(_filled(loop))
    assert {name: _tokens(outputs) for name, outputs in heard.items()} == {n: _tokens(o) for n, o in plain.items()}
    assert (executor.num_refused, executor.num_released, scheduler.token_budget) == (1, 1, 64)
    executor.refuses = False
    loop.add(_ask("z", 60, max_tokens=CALM_STEPS + 20))
    _finish(loop)
    assert (executor.num_refused, executor.most_under_way) == (1, 2)


def test_behind_single_tokens_nothing_else_is_launched_where_others_would_be_waited_for() -> None:
    """A prompt enters with a step of its own, in turn; before and after it, and where it finds no slot, steps are launched ahead."""
    executor = TightExecutor(overlaps=True, follow="single tokens")
    loop, _ = _loop(executor)
    for i in range(7):
        loop.add(_ask(f"{i}", 4, max_tokens=60))
    ahead: list[int] = []
    for number in range(30):
        if number == 10:
            loop.add(_ask("late", 30, max_tokens=60))
        if number == 20:
            loop.add(_ask("no slot", 30, max_tokens=5))
        loop.step()
        ahead.append(sum(plan.num_tokens for plan in executor.under_way))
    # Behind the first prompts and behind the late one single tokens follow; when it came, the step under way was the last of its kind.
    assert ahead[:10] == [7] * 10
    assert ahead[10:13] == [0, 8, 8]
    assert ahead[20:] == [8] * 10
    assert all(plan.num_tokens in (7, 8) for plan in executor.under_way)


class LacksLater(TightExecutor):
    """Finds out when a step is collected that it lacked memory: in the collections of these numbers."""

    def __init__(self, lacking: set[int], *, overlaps: bool) -> None:
        super().__init__(overlaps=overlaps)
        self.lacking = lacking
        self.num_collected = 0

    def collect(self, plan: StepPlan) -> StepResult:
        self.num_collected += 1
        if self.num_collected not in self.lacking:
            return super().collect(plan)
        self.under_way.clear()
        raise OutOfMemoryError("no memory")


def test_a_step_that_turns_out_to_lack_memory_is_computed_again(overlaps: bool) -> None:
    """And the one behind it. Smaller the first time; nobody is failed, everybody says what they say with enough memory."""
    plain = _finish(_filled(_loop(TightExecutor())[0]))
    executor = LacksLater({4}, overlaps=overlaps)
    loop, scheduler = _loop(executor)
    heard = _finish(_filled(loop))
    assert {name: _tokens(outputs) for name, outputs in heard.items()} == {n: _tokens(o) for n, o in plain.items()}
    assert (scheduler.token_budget, executor.num_released, scheduler.stats().num_used_blocks) == (32, 1, 0)


def test_the_first_step_of_all_is_computed_again_too(overlaps: bool) -> None:
    executor = LacksLater({1}, overlaps=overlaps)
    loop, scheduler = _loop(executor)
    heard = _finish(_filled(loop))
    assert {outputs[-1].finish_reason for outputs in heard.values()} == {"length"}
    assert (scheduler.token_budget, executor.num_released) == (32, 1)


def test_a_step_that_lacked_memory_counts_what_it_decided_once(overlaps: bool) -> None:
    loop, scheduler = _loop(LacksLater({1, 3}, overlaps=overlaps))
    _filled(loop)
    queried = 0
    while loop.has_work:
        queried += loop.step().stats.num_prefix_query_tokens
    assert queried == scheduler.stats().num_prefix_query_tokens > 0


class NoRoomAheadNorLater(LacksLater):
    """Refuses the first step that is launched ahead, and finds out that the one behind it lacked memory."""

    def __init__(self) -> None:
        super().__init__({2}, overlaps=True)

    def launch(self, plan: StepPlan) -> StepPlan:
        self.limit = 0 if self.under_way and not self.num_refused else 10**9
        return super().launch(plan)


def test_a_step_that_lacks_memory_behind_one_refused_ahead_is_computed_again() -> None:
    """What was refused was given up for speed alone: room has not been made yet."""
    executor = NoRoomAheadNorLater()
    loop, scheduler = _loop(executor)
    heard = _finish(_filled(loop))
    assert {outputs[-1].finish_reason for outputs in heard.values()} == {"length"}
    assert (executor.num_refused, executor.num_released, scheduler.token_budget) == (1, 2, 32)


def test_a_step_that_lacks_memory_when_the_budget_has_just_grown_is_computed_again(overlaps: bool) -> None:
    executor = LacksLater({1}, overlaps=overlaps)
    loop, scheduler = _loop(executor)
    loop.add(_ask("a", 60, max_tokens=300))
    # The step that lacks memory, and as many that fit as the budget takes to grow.
    for _ in range(1 + CALM_STEPS):
        loop.step()
    assert scheduler.token_budget == 64
    executor.lacking.add(executor.num_collected + 1)
    assert [outputs[-1].finish_reason for outputs in _finish(loop).values()] == ["length"]
    assert scheduler.token_budget == 32


def test_a_launch_refused_behind_a_step_that_lacked_memory_fails_the_largest_request() -> None:
    """One retry with less, whether memory is missed by the launch or later."""
    executor = LacksLater({2}, overlaps=False)
    loop, scheduler = _loop(executor)
    loop.add(_ask("a", 10))
    loop.step()
    loop.step()
    executor.limit = 0
    assert [outputs[-1].error_code for outputs in _finish(loop).values()] == ["out_of_memory"]
    assert scheduler.token_budget == 32


def test_the_largest_request_fails_where_the_next_step_turns_out_to_lack_memory_too(overlaps: bool) -> None:
    executor = LacksLater({4, 5}, overlaps=overlaps)
    loop, scheduler = _loop(executor)
    heard = _finish(_filled(loop))
    ends = [outputs[-1].error_code for outputs in heard.values()]
    assert sorted(code for code in ends if code) == ["out_of_memory"]
    assert scheduler.stats().num_used_blocks == 0


def test_a_request_added_or_aborted_between_steps_is_heard_of_while_others_run_ahead() -> None:
    executor = TightExecutor(overlaps=True)
    loop, scheduler = _loop(executor)
    loop.add(_ask("long", 8, max_tokens=40))
    heard: dict[str, list[TokenOutput]] = {}
    for number in range(100):
        if number == 5:
            loop.add(_ask("late", 30, max_tokens=3))
        if number == 12:
            loop.abort("long")
        if number == 14:
            loop.add(_ask("last", 5, max_tokens=2))
        for output in loop.step().every() if loop.has_work else ():
            heard.setdefault(output.request_id, []).append(output)
    assert [heard[name][-1].finish_reason for name in ("long", "late", "last")] == ["cancelled", "length", "length"]
    assert _tokens(heard["late"]) == [30, 31, 32]
    assert _tokens(heard["last"]) == [5, 6]
    said = _tokens(heard["long"])
    assert said == list(range(8, 8 + len(said)))
    assert scheduler.stats().num_used_blocks == 0
