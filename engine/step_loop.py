"""One step after another: schedule, launch, collect, update, and what happens when the device has no memory for a step.

Guarantees (reliability rule 5): a step without memory is decided and run once more with the prefix cache dropped and half the token
budget; if that does not help, the largest request of the step ends with `out_of_memory`, and so on until a step fits or
nothing is left. Others go on with the same tokens. Torch-free; knows no model and no vocabulary.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from engine.errors import OutOfMemoryError
from engine.output import StepOutput, StepStats
from engine.request import Request
from engine.scheduling.config import SchedulerStats
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step import Follow, StepPlan, StepResult

Plan = TypeVar("Plan", StepPlan, StepPlan | None)

CALM_STEPS = 256
"""Steps without lack of memory after which a shrunk token budget doubles again, and steps are launched ahead again."""


class Executor(Protocol):
    """What runs a plan; the `Runner` in production."""

    def launch(self, plan: StepPlan) -> Any:
        """Starts the plan, behind those launched before. Raises `OutOfMemoryError`; the plan may then be retracted."""
        ...

    def may_follow(self, launched: Any) -> Follow:
        """What should be launched before this step is collected, since it computes by itself."""
        ...

    def collect(self, launched: Any) -> StepResult:
        """Waits for a plan, in the order of launches. Raises `OutOfMemoryError`; then it and those behind it may be retracted."""
        ...

    def release_memory(self) -> None:
        """Gives back what only caches."""
        ...


class StepLoop:
    """Owner of the scheduler and of the step's stamps. `clock` gives CLOCK_MONOTONIC nanoseconds."""

    def __init__(self, scheduler: Scheduler, executor: Executor, clock: Callable[[], int]) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._clock = clock
        self._full_budget = scheduler.token_budget
        self._calm = 0
        # Whether cache and budget were cut since a step was last collected: what still lacks memory is failed for it.
        self._shrunk = False
        self._step = 0
        self._counted = scheduler.stats()
        self._launched: tuple[StepPlan, Any] | None = None
        self._schedule_ns = 0
        self._num_alone = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` would compute or hand over something. Not for a step under way whose sequences have all ended: the next
        request's first step collects it."""
        return self._scheduler.has_work

    def add(self, request: Request) -> None:
        """Raises the scheduler's typed refusals."""
        self._scheduler.add(request, self._clock())

    def abort(self, request_id: str) -> None:
        """Ends a request at the next boundary; unknown ids are ignored."""
        self._scheduler.abort(request_id)

    def step(self) -> StepOutput:
        """One step, possibly of no chunks: the outputs and the numbers. Raises what the executor raises but lack of memory.

        Where steps overlap, the one after is decided and launched before this one is waited for.
        """
        started = self._clock()
        self._schedule_ns = 0
        self._calm += 1
        (plan, launched), self._launched = self._launched or self._launch(), None
        refused: StepPlan | None = None
        may_follow = self._executor.may_follow(launched) if plan.chunks and not self._num_alone else "nothing"
        if may_follow != "nothing":
            singles = may_follow == "single tokens"
            ahead = self._decide(lambda now_ns: self._scheduler.schedule_ahead(now_ns, singles=singles))
            if ahead is not None:
                try:
                    self._launched = (ahead, self._executor.launch(ahead))
                except OutOfMemoryError:
                    refused = ahead
        self._num_alone = max(0, self._num_alone - 1)
        try:
            result = self._executor.collect(launched) if plan.chunks else StepResult(chunks=())
        except OutOfMemoryError as error:
            return self._take_back(plan, error, started)
        executed = self._clock()
        self._shrunk = False
        outputs = self._scheduler.update(plan, result, executed)
        if refused is not None:
            # There may be memory for one step and not for two: whether this one fits alone is for the next call to find out.
            self._scheduler.retract(refused)
            self._executor.release_memory()
            self._num_alone, self._calm = CALM_STEPS, 0
        self._grow_back()
        self._step += 1
        num_single = sum(1 for chunk in plan.chunks if chunk.num_tokens == 1)
        now = self._scheduler.stats()
        stats = self._stats(
            now,
            started=started,
            schedule_ns=self._schedule_ns,
            execute_ns=executed - started - self._schedule_ns,
            num_prefill=plan.num_tokens - num_single,
            num_decode=num_single,
        )
        self._counted = now
        return StepOutput(outputs=outputs, stats=stats)

    def stats(self) -> StepStats:
        """The present state as a step of no tokens."""
        return self._stats(
            self._scheduler.stats(), started=self._clock(), schedule_ns=0, execute_ns=0, num_prefill=0, num_decode=0
        )

    def _decide(self, schedule: Callable[[int], Plan]) -> Plan:
        began = self._clock()
        plan = schedule(began)
        self._schedule_ns += self._clock() - began
        return plan

    def _launch(self) -> tuple[StepPlan, Any]:
        """Decides and launches a plan, or what is left of it once memory suffices."""
        while True:
            plan = self._decide(self._scheduler.schedule)
            if not plan.chunks:
                return plan, None
            try:
                return plan, self._executor.launch(plan)
            except OutOfMemoryError as error:
                self._make_room(plan, error)

    def _make_room(self, plan: StepPlan, error: OutOfMemoryError) -> None:
        """First by dropping what only speeds up, then by failing the largest request of the plan."""
        scheduler = self._scheduler
        largest = scheduler.largest_request(plan)
        scheduler.retract(plan)
        self._executor.release_memory()
        self._calm = 0
        if not self._shrunk:
            self._shrunk = True
            scheduler.reset_prefix_cache()
            scheduler.set_token_budget(scheduler.token_budget // 2)
        elif largest is not None:
            scheduler.fail(largest, error.code, error.message)

    def _take_back(self, plan: StepPlan, error: OutOfMemoryError, started: int) -> StepOutput:
        """What a step says that turned out to lack memory: nothing. It and the one behind it count as never run."""
        self._launched = None
        self._make_room(plan, error)
        self._num_alone = CALM_STEPS
        self._step += 1
        now = self._scheduler.stats()
        stats = self._stats(
            now,
            started=started,
            schedule_ns=self._schedule_ns,
            execute_ns=self._clock() - started - self._schedule_ns,
            num_prefill=0,
            num_decode=0,
        )
        self._counted = now
        return StepOutput(outputs=(), stats=stats)

    def _grow_back(self) -> None:
        if self._calm >= CALM_STEPS and self._scheduler.token_budget < self._full_budget:
            self._calm = 0
            self._scheduler.set_token_budget(self._scheduler.token_budget * 2)

    def _stats(
        self, now: SchedulerStats, *, started: int, schedule_ns: int, execute_ns: int, num_prefill: int, num_decode: int
    ) -> StepStats:
        # The scheduler counts since its start; a step tells what it added.
        before = self._counted
        return StepStats(
            step=self._step,
            started_ns=started,
            ended_ns=self._clock(),
            num_prefill_tokens=num_prefill,
            num_decode_tokens=num_decode,
            num_running=now.num_running,
            num_waiting=now.num_waiting,
            num_free_blocks=now.num_free_blocks,
            num_evictable_blocks=now.num_evictable_blocks,
            num_used_blocks=now.num_used_blocks,
            num_wasted_slots=now.num_wasted_slots,
            num_preemptions=now.num_preemptions - before.num_preemptions,
            num_prefix_query_tokens=now.num_prefix_query_tokens - before.num_prefix_query_tokens,
            num_prefix_hit_tokens=now.num_prefix_hit_tokens - before.num_prefix_hit_tokens,
            schedule_ns=schedule_ns,
            execute_ns=execute_ns,
        )
