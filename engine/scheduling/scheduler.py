"""Which tokens run next: the one place that decides, and the owner of order and of every sequence's counters.

A step is `schedule` -> run -> `update`; both ends are step boundaries, and nothing is freed elsewhere. The step after may be
decided (`schedule_ahead`) before this one has said anything: what it computes for a sequence that ends meanwhile is dropped. Each
sequence's `num_computed_tokens` chases its `num_tokens`; prefill, decode, resume after preemption and prefix hits are that chase alone.
Order of a step: the oldest running sequence, the other decodes, the other prefills, then waiting sequences, each group in policy
order, within the token budget (`planner`). `n` choices: the first computes the prompt, the others then find its blocks.

Invariants: I1 0 <= num_computed <= num_tokens and the block table covers computed + scheduled. I3 a chunk holds >= 1 token, a
sequence has at most one, their sum is within the budget. I4 blocks are published when computed, the last token is never taken
from the cache, admission assigns the counter. I5 `abort` and `fail` only mark. I6 each accepted choice ends in exactly one
output with a finish reason. I7 what can never fit is refused by `add`. I8 nothing here changes what a sequence is computed
from. I9 while something waits or runs, a step schedules something. I10 outputs are handed over, never waited for.
Pure Python: no clock (`now_ns` comes in), no threads, no tensors. Knows no text and no transport. Who may enter the engine, and
when, is decided by the service's `admission.py`.
"""

from engine.errors import EngineFullError, InvalidFieldError, PromptTooLongError, TooManyTokensError
from engine.output import FinishReason, TokenLogprobs, TokenOutput
from engine.request import Request
from engine.scheduling.config import SchedulerConfig, SchedulerStats
from engine.scheduling.live import LiveRequest, Mark
from engine.scheduling.planner import Planner
from engine.scheduling.policy import POLICIES
from engine.scheduling.prefix_cache import extend_hashes, root_hash
from engine.scheduling.sequence import Sequence
from engine.scheduling.step import Chunk, ChunkResult, StepPlan, StepResult

__all__ = ["Scheduler", "SchedulerConfig", "SchedulerStats"]

NUMERIC_ERROR = "the model gave no finite number for this sequence"


class Scheduler:
    """Single-threaded; each plan of `schedule` or `schedule_ahead` ends in its `update` or `retract`, in order, with one other under way
    at most; any other call may stand between any two."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._planner = Planner(config)
        self._key = POLICIES[config.policy]
        self._requests: dict[str, LiveRequest] = {}
        self._roots: dict[str, bytes] = {}
        self._marked: list[str] = []
        self._num_parked = 0
        self._pending: list[TokenOutput] = []
        self._in_flight: list[tuple[StepPlan, list[Sequence | None]]] = []
        self._num_steps = 0
        self._num_arrivals = 0

    @property
    def config(self) -> SchedulerConfig:
        """What it was built with."""
        return self._config

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something or hand something over."""
        return bool(self._requests or self._pending)

    @property
    def token_budget(self) -> int:
        """Tokens that the next plan may hold."""
        return self._planner.token_budget

    def set_token_budget(self, num_tokens: int) -> int:
        """Holds the next plans to so many tokens, within [1, max_num_batched_tokens]; gives the value taken.

        For a device that ran out of memory. What runs above the budget advances in policy order.
        """
        self._planner.token_budget = max(1, min(num_tokens, self._config.max_num_batched_tokens))
        return self._planner.token_budget

    def add(self, request: Request, now_ns: int) -> None:
        """Accepts a request; choices whose tokens already end them finish with the next `update`.

        Raises, and then keeps nothing: `PromptTooLongError`; `TooManyTokensError` (I7: prompt + max_tokens against context and
        block pool); `InvalidFieldError` for an id that is running; `EngineFullError` when its choices would pass
        `max_num_waiting` and others wait.
        """
        self._refuse_what_cannot_fit(request)
        sampling = request.sampling
        choices = [choice for choice in range(sampling.n) if choice not in request.ended_choices]
        num_waiting = len(self._planner.waiting) + self._num_parked
        if num_waiting and num_waiting + len(choices) > self._config.max_num_waiting:
            raise EngineFullError(f"{num_waiting} sequences wait in the engine; the limit is {self._config.max_num_waiting}")
        eos = () if sampling.ignore_eos else self._config.eos_token_ids
        stops = tuple(dict.fromkeys((*sampling.stop_token_ids, *eos)))
        live: list[Sequence] = []
        for choice in choices:
            key = self._key(request.priority, self._num_arrivals)
            sequence = Sequence(request, choice, self._num_arrivals, key, stops, now_ns)
            self._num_arrivals += 1
            reason = sequence.ended_before()
            if reason is None:
                live.append(sequence)
            else:
                self._pending.append(_final(sequence, reason, stop_token_id=sequence.stop_token(reason)))
        if live:
            self._enqueue(request, live)

    def abort(self, request_id: str) -> None:
        """Marks the request: it ends with "cancelled" at the next boundary. Unknown ids are ignored."""
        self._mark(request_id, Mark("cancelled"))

    def fail(self, request_id: str, code: str, message: str) -> None:
        """Marks the request: it ends with "error", `code` and `message` at the next boundary. Unknown ids are ignored."""
        self._mark(request_id, Mark("error", code, message))

    def schedule(self, now_ns: int) -> StepPlan:
        """The next step; without chunks only if nothing lives. Raises `RuntimeError` while a plan is under way."""
        if self._in_flight:
            raise RuntimeError(f"step {self._in_flight[0][0].step} has neither been updated nor retracted")
        return self._plan(now_ns, ahead=False)

    def schedule_ahead(self, now_ns: int, *, singles: bool = False) -> StepPlan | None:
        """The step after the one under way, whose sampling chunks will say one token each; None when there is nothing to run yet.

        For a device that computes steps in order. None, too, where blocks are short: whom to preempt is decided with nothing
        under way; and with `singles` where anything but single tokens of what runs already might be in it. Raises
        `RuntimeError` unless one plan is under way.
        """
        if len(self._in_flight) != 1:
            raise RuntimeError(f"{len(self._in_flight)} steps are under way; one must be")
        self._end_marked()  # it may free a slot
        if self._planner.was_short or (singles and not self._planner.singles_follow(now_ns)):
            return None
        plan = self._plan(now_ns, ahead=True)
        return plan if plan.chunks else None

    def update(self, plan: StepPlan, result: StepResult, now_ns: int) -> tuple[TokenOutput, ...]:
        """Takes the results of the plan that is longest under way; gives every output since the last call, those of ended requests
        included.

        Raises `RuntimeError`, and changes nothing, for another plan, or when `result` does not match it.
        """
        if not self._in_flight or plan is not self._in_flight[0][0] or len(result.chunks) != len(plan.chunks):
            raise RuntimeError(f"step {plan.step}: not the plan under way, or {len(result.chunks)} results for its chunks")
        _, sequences = self._in_flight.pop(0)
        outputs, self._pending = self._pending, []
        for chunk, sequence, chunk_result in zip(plan.chunks, sequences, result.chunks, strict=True):
            # One that ended after the plan was made has left its slot.
            if sequence is not None and sequence.slot == chunk.slot:
                output = self._take(sequence, chunk, chunk_result, now_ns)
                if output is not None:
                    outputs.append(output)
        self._end_marked()
        outputs.extend(self._pending)
        self._pending = []
        return tuple(outputs)

    def retract(self, plan: StepPlan) -> None:
        """The plan failed as a whole and said nothing: its chunks, and those of a plan behind it, count as never run; the next plan sends
        their starts anew.

        Raises `RuntimeError` when `plan` is not the one that is longest under way.
        """
        if not self._in_flight or plan is not self._in_flight[0][0]:
            raise RuntimeError(f"step {plan.step} is not under way, or not the first that is")
        for failed, _ in self._in_flight:
            self._planner.retract(failed)
        self._in_flight.clear()

    def largest_request(self, plan: StepPlan) -> str | None:
        """The request with the most tokens in context among the plan's chunks: whom to fail when memory does not suffice."""
        in_plan = [sequence for chunk in plan.chunks if (sequence := self._planner.slots[chunk.slot]) is not None]
        if not in_plan:
            return None
        return max(in_plan, key=lambda s: (s.num_computed_tokens + s.num_scheduled_tokens, s.arrival)).request.request_id

    def reset_prefix_cache(self) -> None:
        """Nothing computed so far is found in the cache any more; what runs goes on."""
        self._planner.pool.forget_all()

    def stats(self) -> SchedulerStats:
        """The numbers as they stand."""
        planner, block_size = self._planner, self._config.block_size
        return SchedulerStats(
            num_running=len(planner.running),
            num_waiting=len(planner.waiting) + self._num_parked,
            num_free_blocks=planner.pool.num_free,
            num_evictable_blocks=planner.pool.num_evictable,
            num_used_blocks=planner.pool.num_used,
            # Shared blocks are full and computed, so each unused slot belongs to one sequence alone.
            num_wasted_slots=sum(len(s.block_ids) * block_size - s.num_computed_tokens for s in planner.running.items),
            num_preemptions=planner.num_preemptions,
            num_prefix_query_tokens=planner.num_prefix_query_tokens,
            num_prefix_hit_tokens=planner.num_prefix_hit_tokens,
        )

    def _plan(self, now_ns: int, *, ahead: bool) -> StepPlan:
        self._end_marked()
        plan = self._planner.plan(self._num_steps, self._roots, now_ns, ahead=ahead)
        self._num_steps += 1
        if plan.chunks or not ahead:
            self._in_flight.append((plan, [self._planner.slots[chunk.slot] for chunk in plan.chunks]))
        return plan

    def _refuse_what_cannot_fit(self, request: Request) -> None:
        if request.request_id in self._requests:
            raise InvalidFieldError("request_id", "is already running in this engine")
        config, num_prompt = self._config, len(request.prompt_token_ids)
        if num_prompt >= config.max_model_len:
            raise PromptTooLongError(
                f"the prompt has {num_prompt} tokens; the context of {config.max_model_len} leaves no room for one more",
                field="prompt",
            )
        num_total = num_prompt + request.sampling.max_tokens
        capacity = min(config.max_model_len, config.num_blocks * config.block_size)
        if num_total > capacity:
            raise TooManyTokensError(
                f"{num_prompt} prompt tokens and max_tokens {request.sampling.max_tokens} make {num_total}; "
                f"at most {capacity} can ever fit here",
                field="sampling.max_tokens",
            )

    def _enqueue(self, request: Request, live: list[Sequence]) -> None:
        config, leader = self._config, live[0]
        num_shared = len(request.prompt_token_ids) // config.block_size * config.block_size
        if config.enable_prefix_cache:
            root = root_hash(request.cache_salt)
            self._roots[request.request_id] = root
            prompt_hashes: list[bytes] = []
            extend_hashes(prompt_hashes, root, request.prompt_token_ids, config.block_size)
            for sequence in live:
                sequence.block_hashes = list(prompt_hashes)
        shares = config.enable_prefix_cache and num_shared > 0
        parked = live[1:] if shares else []
        self._requests[request.request_id] = LiveRequest(live, parked, num_shared)
        self._num_parked += len(parked)
        for sequence in [leader] if shares else live:
            self._planner.waiting.add(sequence)

    def _mark(self, request_id: str, mark: Mark) -> None:
        live = self._requests.get(request_id)
        if live is not None and live.mark is None:
            live.mark = mark
            self._marked.append(request_id)

    def _end_marked(self) -> None:
        for request_id in self._marked:
            live = self._requests.get(request_id)
            if live is None or live.mark is None:
                continue
            mark = live.mark
            self._release_parked(live)
            for sequence in list(live.sequences):
                self._pending.append(_final(sequence, mark.reason, code=mark.code, message=mark.message))
                self._leave(sequence)
        self._marked.clear()

    def _take(self, sequence: Sequence, chunk: Chunk, result: ChunkResult, now_ns: int) -> TokenOutput | None:
        """One chunk's result: advances the counter, publishes full blocks, appends what was said. None: nothing to say."""
        sequence.num_scheduled_tokens -= chunk.num_tokens
        sequence.num_steps += 1
        if chunk.start < sequence.num_prefill_tokens:
            sequence.num_prefill_chunks += 1
        live = self._requests[sequence.request.request_id]
        if live.mark is not None:
            return None
        if not result.finite:
            # Others must not continue from numbers that may be no numbers.
            self._planner.pool.forget(sequence.block_ids)
            output = _final(sequence, "error", code="numeric_error", message=NUMERIC_ERROR)
            self._leave(sequence)
            return output
        said = result.token_ids if chunk.samples else ()
        # A chunk that should have said a token and did not is run again from its last token.
        sequence.num_computed_tokens = chunk.start + chunk.num_tokens - (chunk.samples and not said)
        self._publish(sequence)
        if live.parked and sequence is live.leader and sequence.num_computed_tokens >= live.num_shared_tokens:
            self._release_parked(live)
        return self._say(sequence, said, result.logprobs, now_ns) if said else None

    def _say(
        self, sequence: Sequence, said: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...] | None, now_ns: int
    ) -> TokenOutput:
        first_position = sequence.num_output_tokens
        count, reason = sequence.say(said)
        is_first = sequence.first_token_ns == 0
        if is_first:
            sequence.first_token_ns = now_ns
        sequence.last_token_ns = now_ns
        output = TokenOutput(
            request_id=sequence.request.request_id,
            choice=sequence.choice,
            seq=first_position,
            token_ids=said[:count],
            logprobs=None if logprobs is None else logprobs[:count],
            finish_reason=reason,
            stop_token_id=sequence.stop_token(reason),
            facts=sequence.facts() if is_first or reason is not None else None,
        )
        if reason is not None:
            self._leave(sequence)
        return output

    def _publish(self, sequence: Sequence) -> None:
        block_size = self._config.block_size
        num_full = sequence.num_computed_tokens // block_size
        if not self._config.enable_prefix_cache or num_full <= sequence.num_published_blocks:
            return
        root = self._roots[sequence.request.request_id]
        extend_hashes(sequence.block_hashes, root, sequence.token_ids, block_size)
        for i in range(sequence.num_published_blocks, num_full):
            self._planner.pool.publish(sequence.block_ids[i], sequence.block_hashes[i])
        sequence.num_published_blocks = num_full

    def _release_parked(self, live: LiveRequest) -> None:
        for sequence in live.parked:
            self._planner.waiting.add(sequence)
        self._num_parked -= len(live.parked)
        live.parked = []

    def _leave(self, sequence: Sequence) -> None:
        request_id = sequence.request.request_id
        live = self._requests[request_id]
        self._planner.leave(sequence)
        live.sequences.remove(sequence)
        if sequence is live.leader:
            self._release_parked(live)
        if not live.sequences:
            del self._requests[request_id]
            self._roots.pop(request_id, None)


def _final(
    sequence: Sequence, reason: FinishReason, *, stop_token_id: int | None = None, code: str = "", message: str = ""
) -> TokenOutput:
    return TokenOutput(
        request_id=sequence.request.request_id,
        choice=sequence.choice,
        seq=sequence.num_output_tokens,
        token_ids=(),
        finish_reason=reason,
        stop_token_id=stop_token_id,
        error_code=code,
        error_message=message,
        facts=sequence.facts(),
    )
