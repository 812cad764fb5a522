"""An engine without a model: says a deterministic function of (prompt, seed, choice, position) at a configured pace.

Same face as `Engine`, so the worker and its supervisor cannot tell the difference: what fault and throughput tests of the
service run on. Guarantees: tokens do not depend on load, pace, restarts or tokens already said; each choice ends in one
terminal output; with a pace sequences speak in step, as a model's do; limits, minimum and maximum lengths, stop ids, aborts and
resumption behave as in the real engine. It never says an end-of-sequence token, keeps no prefix cache, and says one token a choice a
step unless `stand_in_step_tokens` allows more.

`SLUICE_STAND_IN_FAULT` makes it misbehave on purpose (`Fault`).
"""

import time
from collections import deque
from collections.abc import Callable

from engine.config import EngineConfig
from engine.errors import EngineFullError, InvalidFieldError, PromptTooLongError, TooManyTokensError
from engine.limits import check_vocabulary
from engine.output import EngineFacts, FinishReason, PlainColumns, StepOutput, StepStats, TokenOutput
from engine.request import Request
from engine.stand_in_fault import Fault
from engine.stand_in_script import Choice, stand_in_facts, stand_in_state, stand_in_token

_LONGEST_PAUSE_S = 0.05
"""Longest a step sleeps for its pace: aborts and new requests wait no longer, and progress is still heard."""


class StandInEngine:
    """See the module. `sleep` and `clock` are the only outside world."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        fault: Fault | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config = config
        self._facts = stand_in_facts(config)
        self._fault = fault
        self._clock = clock
        self._sleep = sleep
        self._gap_ns = int(1e9 / config.stand_in_tokens_per_s) if config.stand_in_tokens_per_s else 0
        self._live: dict[str, list[Choice]] = {}
        self._waiting: deque[Choice] = deque()
        self._running: list[Choice] = []
        self._outputs: list[TokenOutput] = []
        self._plain = PlainColumns()
        self._step = 0
        self._used_blocks = 0
        self._used_tokens = 0

    @property
    def facts(self) -> EngineFacts:
        """What the stand-in claims to be."""
        return self._facts

    @property
    def has_work(self) -> bool:
        """Whether `step` would say or do something."""
        return bool(self._running or self._waiting or self._outputs)

    def add(self, request: Request) -> None:
        """Takes a request. Raises the same typed errors as the real engine."""
        check_vocabulary(request, self._facts.vocab_size)
        sampling, facts = request.sampling, self._facts
        prompt = len(request.prompt_token_ids)
        if prompt >= facts.max_model_len:
            raise PromptTooLongError(f"the prompt has {prompt} tokens; the context is {facts.max_model_len}", field="prompt")
        if prompt + sampling.max_tokens > facts.max_model_len:
            raise TooManyTokensError(
                f"prompt + max_tokens is {prompt + sampling.max_tokens} tokens; {facts.max_model_len} fit",
                field="sampling.max_tokens",
            )
        if request.request_id in self._live:
            raise InvalidFieldError("request_id", "is already running")
        if self._waiting and len(self._waiting) + sampling.n > self._config.max_num_waiting:
            raise EngineFullError("the engine's waiting queue is full")
        if self._fault is not None:
            self._fault.on_prompt(request.prompt_token_ids)
        now = self._clock()
        choices = [
            Choice(
                request=request,
                choice=choice,
                state=stand_in_state(request, choice),
                stops=frozenset(sampling.stop_token_ids),
                said=len(request.output_token_ids[choice]) if request.output_token_ids else 0,
                added_ns=now,
            )
            for choice in range(sampling.n)
            if choice not in request.ended_choices
        ]
        if choices:
            self._live[request.request_id] = list(choices)
        for choice in choices:
            self._enter(choice)

    def _enter(self, choice: Choice) -> None:
        """Queues a choice, unless the tokens already said end it."""
        sampling = choice.request.sampling
        said = choice.request.output_token_ids[choice.choice] if choice.said else ()
        if said and said[-1] in choice.stops and choice.said > sampling.min_tokens:
            self._end(choice, (), "stop", said[-1])
        elif choice.said >= sampling.max_tokens:
            self._end(choice, (), "length", None)
        else:
            self._waiting.append(choice)

    def abort(self, request_id: str) -> None:
        """Ends a request; its outputs come with the next step. Unknown ids are ignored."""
        for choice in list(self._live.get(request_id, ())):
            self._forget(choice)
            self._end(choice, (), "cancelled", None)

    def step(self) -> StepOutput:
        """A step's tokens for every choice that is due, after a pause where none is."""
        self._step += 1
        if self._fault is not None:
            self._fault.on_step(self._step)
        started = self._clock()
        num_prefill = self._let_in(started)
        self._pause(started)
        now = self._clock() if self._gap_ns else started
        num_decode = 0
        still: list[Choice] = []
        for choice in self._running:
            before = choice.said
            if choice.due_ns > now or not self._say(choice, now):
                still.append(choice)
            num_decode += choice.said - before
        self._running = still
        outputs, self._outputs = tuple(self._outputs), []
        return StepOutput(outputs=outputs, stats=self._stats(started, num_prefill, num_decode), plain=self._plain.take())

    def stats(self) -> StepStats:
        """The present state as a step of no tokens."""
        return self._stats(self._clock(), 0, 0)

    def close(self) -> None:
        """Nothing to give back."""

    def _let_in(self, now: int) -> int:
        num_tokens = 0
        while self._waiting and len(self._running) < self._config.max_num_seqs:
            choice = self._waiting.popleft()
            choice.first_scheduled_ns = choice.due_ns = now
            length = choice.num_prompt + choice.said
            choice.num_blocks = -(-length // self._config.block_size)
            self._used_blocks += choice.num_blocks
            self._used_tokens += length
            num_tokens += length
            self._running.append(choice)
        return num_tokens

    def _pause(self, now: int) -> None:
        if self._gap_ns and self._running and not self._outputs:
            wait_ns = min(choice.due_ns for choice in self._running) - now
            if wait_ns > 0:
                self._sleep(min(wait_ns / 1e9, _LONGEST_PAUSE_S))

    def _say(self, choice: Choice, now: int) -> bool:
        """Says a step's tokens; True when they ended the choice."""
        first = choice.said
        tokens: list[int] = []
        reason: FinishReason | None = None
        while reason is None and len(tokens) < self._config.stand_in_step_tokens:
            token, reason = self._next(choice)
            tokens.append(token)
        choice.due_ns = self._next_step(max(choice.due_ns + self._gap_ns * len(tokens), now - self._gap_ns))
        choice.last_token_ns = now
        choice.num_steps += 1
        self._used_tokens += len(tokens)
        num_blocks = -(-(choice.num_prompt + choice.said) // self._config.block_size)
        self._used_blocks += num_blocks - choice.num_blocks
        choice.num_blocks = num_blocks
        if reason is not None:
            self._release(choice)
            self._end(choice, tuple(tokens), reason, tokens[-1] if reason == "stop" else None)
            return True
        request_id = choice.request.request_id
        facts = None
        if not choice.first_token_ns:
            choice.first_token_ns = now
            facts = choice.facts()
        elif len(tokens) == 1:
            self._plain.add(request_id, choice.choice, first, tokens[0])
            return False
        self._outputs.append(
            TokenOutput(
                request_id=request_id,
                choice=choice.choice,
                seq=first,
                token_ids=tuple(tokens),
                facts=facts,
            )
        )
        return False

    def _next_step(self, due_ns: int) -> int:
        """The last instant until `due_ns` at which all sequences speak: a model's step says a token for each of them."""
        return due_ns - due_ns % self._gap_ns if self._gap_ns else due_ns

    def _next(self, choice: Choice) -> tuple[int, FinishReason | None]:
        """The next token, and the reason when it ends the choice."""
        sampling, vocab_size = choice.request.sampling, self._facts.vocab_size
        token = stand_in_token(choice.state, choice.said, vocab_size)
        choice.said += 1
        if token in choice.stops:
            if choice.said > sampling.min_tokens:
                return token, "stop"
            token = next(t % vocab_size for t in range(token, token + vocab_size) if t % vocab_size not in choice.stops)
        return token, "length" if choice.said >= sampling.max_tokens else None

    def _end(self, choice: Choice, tokens: tuple[int, ...], reason: FinishReason, stop: int | None) -> None:
        if tokens and not choice.first_token_ns:
            choice.first_token_ns = choice.last_token_ns
        self._outputs.append(
            TokenOutput(
                request_id=choice.request.request_id,
                choice=choice.choice,
                seq=choice.said - len(tokens),
                token_ids=tokens,
                finish_reason=reason,
                stop_token_id=stop,
                facts=choice.facts(),
            )
        )
        live = self._live[choice.request.request_id]
        live.remove(choice)
        if not live:
            del self._live[choice.request.request_id]

    def _forget(self, choice: Choice) -> None:
        if choice in self._waiting:
            self._waiting.remove(choice)
        if choice in self._running:
            self._running.remove(choice)
            self._release(choice)

    def _release(self, choice: Choice) -> None:
        self._used_blocks -= choice.num_blocks
        self._used_tokens -= choice.num_prompt + choice.said

    def _stats(self, started: int, num_prefill: int, num_decode: int) -> StepStats:
        ended = self._clock()
        total = self._facts.num_blocks
        return StepStats(
            step=self._step,
            started_ns=started,
            ended_ns=ended,
            num_prefill_tokens=num_prefill,
            num_decode_tokens=num_decode,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_free_blocks=total - self._used_blocks,
            num_evictable_blocks=0,
            num_used_blocks=self._used_blocks,
            num_wasted_slots=self._used_blocks * self._config.block_size - self._used_tokens,
            num_preemptions=0,
            num_prefix_query_tokens=0,
            num_prefix_hit_tokens=0,
            schedule_ns=0,
            execute_ns=ended - started,
        )
