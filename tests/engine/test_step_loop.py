"""Steps without memory: retried once, then the largest request alone is failed; budgets shrink and recover."""

import itertools

from engine.errors import OutOfMemoryError
from engine.output import TokenOutput
from engine.request import Request, SamplingParams
from engine.scheduling.config import SchedulerConfig
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step import ChunkResult, StepPlan, StepResult
from engine.step_loop import CALM_STEPS, StepLoop


class TightExecutor:
    """Says position numbers; a step of more than `limit` tokens, or that holds `poison` tokens of context, does not fit."""

    def __init__(self, limit: int = 10**9, poison: int = 10**9) -> None:
        self.limit = limit
        self.poison = poison
        self.num_refused = 0
        self.num_released = 0

    def execute(self, plan: StepPlan) -> StepResult:
        longest = max((chunk.start + chunk.num_tokens for chunk in plan.chunks), default=0)
        if plan.num_tokens > self.limit or longest > self.poison:
            self.num_refused += 1
            raise OutOfMemoryError("no memory")
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


def test_a_step_that_does_not_fit_is_retried_smaller() -> None:
    """Half the budget fits: nobody is failed, everybody says what they say with enough memory."""
    plain = _finish(_filled(_loop(TightExecutor())[0]))
    executor = TightExecutor(limit=32)
    loop, scheduler = _loop(executor)
    heard = _finish(_filled(loop))
    assert {name: _tokens(outputs) for name, outputs in heard.items()} == {n: _tokens(o) for n, o in plain.items()}
    assert {outputs[-1].finish_reason for outputs in heard.values()} == {"length"}
    assert (executor.num_refused, executor.num_released, scheduler.token_budget) == (1, 1, 32)


def _filled(loop: StepLoop) -> StepLoop:
    for name, prompt in (("a", 10), ("b", 30), ("c", 50)):
        loop.add(_ask(name, prompt))
    return loop


def test_only_the_largest_request_fails_when_a_retry_does_not_help() -> None:
    """A context that never fits ends with `out_of_memory`; the others finish with their own tokens."""
    plain = _finish(_filled(_loop(TightExecutor())[0]))
    loop, _ = _loop(TightExecutor(poison=40), budget=128)
    heard = _finish(_filled(loop))
    assert (heard["c"][-1].finish_reason, heard["c"][-1].error_code) == ("error", "out_of_memory")
    assert [_tokens(heard[name]) for name in "ab"] == [_tokens(plain[name]) for name in "ab"]


def test_each_request_ends_when_nothing_fits() -> None:
    """A device without any memory fails them all, one by one, and the loop comes to rest."""
    loop, scheduler = _loop(TightExecutor(limit=0))
    heard = _finish(_filled(loop))
    assert sorted((name, outputs[-1].error_code) for name, outputs in heard.items()) == [
        ("a", "out_of_memory"),
        ("b", "out_of_memory"),
        ("c", "out_of_memory"),
    ]
    assert scheduler.stats().num_used_blocks == 0


def test_the_budget_comes_back_after_calm_steps() -> None:
    """`CALM_STEPS` steps that fit double the budget again, up to the configured one."""
    loop, scheduler = _loop(TightExecutor(limit=32))
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
