"""Drives a scheduler with the toy model and checks every invariant after every operation. Test code only: reads internals."""

from dataclasses import dataclass, field
from hashlib import sha256

from engine.errors import EngineFullError
from engine.output import TokenOutput
from engine.request import Request, SamplingParams
from engine.scheduling.prefix_cache import extend_hashes
from engine.scheduling.scheduler import Scheduler, SchedulerConfig
from engine.scheduling.sequence import Sequence
from engine.scheduling.step import StepPlan, StepResult
from tests.engine.scheduling.toy_model import EOS, ToyModel, expected


@dataclass
class Heard:
    """What one choice said so far."""

    token_ids: list[int]
    reason: str | None = None
    code: str = ""
    outputs: list[TokenOutput] = field(default_factory=list)


class Harness:
    """One scheduler, its model and its listener. `operations` counts calls of the scheduler."""

    def __init__(self, **settings: object) -> None:
        defaults: dict[str, object] = {
            "num_blocks": 16,
            "block_size": 4,
            "max_num_seqs": 4,
            "max_num_waiting": 64,
            "max_num_batched_tokens": 16,
            "max_model_len": 48,
            "watermark": 0.0,
            "eos_token_ids": EOS,
        }
        self.config = SchedulerConfig(**{**defaults, **settings})  # type: ignore[arg-type]
        self.scheduler = Scheduler(self.config)
        self.planner = self.scheduler._planner
        self.pool = self.planner.pool
        self.model = ToyModel(self.config.num_blocks, self.config.block_size, self.pool)
        self.heard: dict[tuple[str, int], Heard] = {}
        self.requests: dict[str, Request] = {}
        self.ended_early: set[str] = set()
        self.operations = 0
        self.now_ns = 0
        self.under_way: tuple[StepPlan, StepResult] | None = None
        self.num_ahead = 0

    def add(self, request: Request) -> bool:
        """False: the queue was full."""
        self.operations += 1
        self.now_ns += 1
        try:
            self.scheduler.add(request, self.now_ns)
        except EngineFullError:
            return False
        self.requests[request.request_id] = request
        for choice in range(request.sampling.n):
            if choice not in request.ended_choices:
                said = list(request.output_token_ids[choice]) if request.output_token_ids else []
                self.heard[request.request_id, choice] = Heard(said)
        return True

    def abort(self, request_id: str) -> None:
        self.operations += 1
        self.ended_early.add(request_id)
        self.scheduler.abort(request_id)

    def fail(self, request_id: str) -> None:
        self.operations += 1
        self.ended_early.add(request_id)
        self.scheduler.fail(request_id, "out_of_memory", "no memory")

    def schedule(self) -> StepPlan:
        self.operations += 1
        self.now_ns += 1
        plan = self.scheduler.schedule(self.now_ns)
        self.check()
        self.check_plan(plan)
        return plan

    def update(self, plan: StepPlan, num_tokens: list[int]) -> tuple[TokenOutput, ...]:
        return self._take(plan, StepResult(chunks=tuple(self.model.run(plan, num_tokens))))

    def step(self, num_tokens: tuple[int, ...] = (1,)) -> StepPlan:
        plan = self.schedule()
        self.update(plan, list(num_tokens))
        return plan

    def overlap(self, *, no_memory_ahead: bool = False) -> None:
        """One step of a loop that launches the step after before it hears of this one; the device computes in that order.

        `no_memory_ahead`: the launch of the step after fails.
        """
        plan, result = self.under_way or self._launched(self.schedule())
        self.under_way = ahead = None
        if plan.chunks:
            self.operations += 1
            self.now_ns += 1
            ahead = self.scheduler.schedule_ahead(self.now_ns)
            self.check()
            if ahead is not None:
                assert ahead.chunks
                self._check_shape(ahead)
                self.num_ahead += 1
                if not no_memory_ahead:
                    self.under_way = self._launched(ahead)
        self._take(plan, result)
        if ahead is not None and no_memory_ahead:
            self.scheduler.retract(ahead)
            self.check()

    def settle(self) -> None:
        """Hears what is under way, so that anything may be done."""
        if self.under_way is not None:
            plan, result = self.under_way
            self.under_way = None
            self._take(plan, result)

    def _launched(self, plan: StepPlan) -> tuple[StepPlan, StepResult]:
        return plan, StepResult(chunks=tuple(self.model.run(plan, [1])))

    def _take(self, plan: StepPlan, result: StepResult) -> tuple[TokenOutput, ...]:
        self.operations += 1
        self.now_ns += 1
        outputs = self.scheduler.update(plan, result, self.now_ns)
        self.listen(outputs)
        self.check()
        return outputs

    def drain(self, num_tokens: tuple[int, ...] = (1,), *, ahead: bool = False) -> int:
        """Steps until nothing is left; gives how many. Fails past the bound: every step runs at least one token (I9)."""
        bound = self.num_steps_bound()
        steps = 0
        while self.scheduler.has_work:
            assert steps <= bound, f"not at an end after {bound} steps"
            if ahead:
                self.overlap()
            else:
                self.step(num_tokens)
            steps += 1
        self.settle()
        return steps

    def num_steps_bound(self) -> int:
        """Each sequence computes each token at most once for every time that it is let in (17, and once more when marked)."""
        live = sum(sequence.max_total_tokens for entry in self.scheduler._requests.values() for sequence in entry.sequences)
        return 20 * live + 2

    def listen(self, outputs: tuple[TokenOutput, ...]) -> None:
        for output in outputs:
            heard = self.heard[output.request_id, output.choice]
            assert heard.reason is None, "an output after the terminal one (I6)"
            assert output.seq == len(heard.token_ids), "a gap or an overlap in the output positions"
            heard.token_ids.extend(output.token_ids)
            heard.reason = output.finish_reason
            heard.code = output.error_code
            heard.outputs.append(output)
            if output.finish_reason == "stop":
                assert output.stop_token_id == heard.token_ids[-1]
            assert bool(output.error_code) == (output.finish_reason == "error")

    def check_ended(self) -> None:
        """I6 and I8: each choice ended once; whole ones said the reference's tokens, the others a prefix of them."""
        for (request_id, choice), heard in self.heard.items():
            token_ids, reason = expected(self.requests[request_id], choice)
            assert heard.reason is not None, f"{request_id}/{choice} never ended"
            if request_id in self.ended_early and heard.reason in ("cancelled", "error"):
                assert heard.token_ids == token_ids[: len(heard.token_ids)]
            else:
                assert (heard.token_ids, heard.reason) == (token_ids, reason), f"{request_id}/{choice}"
        stats = self.scheduler.stats()
        assert (stats.num_used_blocks, stats.num_running, stats.num_waiting) == (0, 0, 0)
        assert len(self.planner._free_slots) == self.config.max_num_seqs

    def check_plan(self, plan: StepPlan) -> None:
        """I3, I9, and the order of a plan."""
        self._check_shape(plan)
        assert bool(plan.chunks) == bool(self.scheduler._requests), "something lives and nothing was scheduled (I9)"

    def _check_shape(self, plan: StepPlan) -> None:
        lengths = [chunk.num_tokens for chunk in plan.chunks]
        slots = [chunk.slot for chunk in plan.chunks]
        assert all(length >= 1 for length in lengths)
        assert len(slots) == len(set(slots))
        assert plan.num_tokens == sum(lengths) <= self.scheduler.token_budget
        assert all(length <= (self.config.max_prefill_chunk or length) for length in lengths)
        num_single = sum(length == 1 for length in lengths)
        assert all(length == 1 for length in lengths[:num_single])
        assert {start.slot for start in plan.starts} <= set(slots)

    def check(self) -> None:
        """I1, I2, I4 and the counts of `stats`."""
        self._check_pool()
        waiting = self.planner.waiting.items
        running = self.planner.running.items
        assert [s.key for s in waiting] == sorted(s.key for s in waiting)
        assert [s.key for s in running] == sorted(s.key for s in running)
        for sequence in running:
            self._check_running(sequence)
        for sequence in waiting:
            assert (sequence.slot, sequence.block_ids, sequence.num_computed_tokens) == (-1, [], 0)
            assert sequence.num_preemptions <= 16
        parked = [s for entry in self.scheduler._requests.values() for s in entry.parked]
        live = [s for entry in self.scheduler._requests.values() for s in entry.sequences]
        assert len(live) == len(waiting) + len(running) + len(parked)
        stats = self.scheduler.stats()
        assert stats.num_waiting == len(waiting) + len(parked)
        assert stats.num_wasted_slots == self._count_wasted()

    def _check_pool(self) -> None:
        tables = [block for s in self.planner.running.items for block in s.block_ids]
        counts = [0] * self.config.num_blocks
        for block in tables:
            counts[block] += 1
        free, evictable = self.pool._free, list(self.pool._evictable)
        used = [block for block, count in enumerate(counts) if count]
        assert [self.pool.ref_count(block) for block in range(self.config.num_blocks)] == counts
        assert sorted([*free, *evictable, *used]) == list(range(self.config.num_blocks))
        assert (self.pool.num_free, self.pool.num_evictable, self.pool.num_used) == (len(free), len(evictable), len(used))
        assert all(self.pool.hash_of(block) is None for block in free)
        assert all(self.pool.hash_of(block) is not None for block in evictable)
        named = {self.pool.hash_of(block): block for block in range(self.config.num_blocks) if self.pool.hash_of(block)}
        assert named == self.pool._block_of

    def _check_running(self, sequence: Sequence) -> None:
        block_size = self.config.block_size
        assert self.planner.slots[sequence.slot] is sequence
        assert 0 <= sequence.num_computed_tokens < sequence.num_tokens
        assert sequence.num_computed_tokens + sequence.num_scheduled_tokens <= len(sequence.block_ids) * block_size
        assert len(set(sequence.block_ids)) == len(sequence.block_ids)
        chain: list[bytes] = []
        root = sha256(b"sluice/prefix-cache/v1\0" + sequence.request.cache_salt.encode()).digest()
        extend_hashes(chain, root, sequence.token_ids, block_size)
        for i, block in enumerate(sequence.block_ids):
            name = self.pool.hash_of(block)
            if name is not None:
                assert name == chain[i], "a block is shared with another salt or other tokens"
                assert (i + 1) * block_size <= sequence.num_computed_tokens, "published before it was computed (I4)"
            if self.pool.ref_count(block) > 1:
                assert (i + 1) * block_size <= sequence.num_computed_tokens, "shared before it was computed"

    def _count_wasted(self) -> int:
        block_size = self.config.block_size
        filled: dict[int, int] = {}
        for sequence in self.planner.running.items:
            for i, block in enumerate(sequence.block_ids):
                held = min(block_size, max(0, sequence.num_computed_tokens - i * block_size))
                filled[block] = max(filled.get(block, 0), held)
        return sum(block_size - held for held in filled.values())


def request(
    request_id: str = "a",
    prompt: tuple[int, ...] | int = 5,
    max_tokens: int = 4,
    **fields: object,
) -> Request:
    """A request; an int prompt means so many tokens made of the id. Unknown keywords go to the sampling parameters."""
    if isinstance(prompt, int):
        base = sum(request_id.encode())
        prompt = tuple((base * 7 + 3 * i) % 31 for i in range(prompt))
    outer = {
        name: fields.pop(name) for name in ("output_token_ids", "ended_choices", "cache_salt", "priority") if name in fields
    }
    sampling = SamplingParams(max_tokens=max_tokens, **{"seed": 1, "ignore_eos": True, **fields})  # type: ignore[arg-type]
    return Request(request_id=request_id, prompt_token_ids=prompt, sampling=sampling, **outer)  # type: ignore[arg-type]
