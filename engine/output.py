"""What the engine says: the border types from the engine to the service.

The engine reports facts (tokens, counts, monotonic stamps); the service makes text, spans and metrics of them.
Stamps are CLOCK_MONOTONIC nanoseconds, which parent and child share on one machine. Standard library only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
Phase = Literal["starting", "loading", "ready"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """One said token's natural-log probability before temperature and filters, and the best alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceFacts:
    """What happened to one choice so far; sent with its first token and again with its last.

    `num_cached_tokens`: prompt (and resumed) tokens taken from the prefix cache when it was first scheduled.
    `num_steps`: steps that held a chunk of it. `first_token_ns` and `last_token_ns` are 0 while there is none.
    """

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_prefill_chunks: int
    num_steps: int
    num_preemptions: int
    num_blocks: int
    added_ns: int
    first_scheduled_ns: int
    first_token_ns: int
    last_token_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """The tokens that one step gave one choice of a request.

    `seq` is the output position of `token_ids[0]`, counted per choice from 0, tokens already said included.
    `finish_reason` is set exactly once a choice, on its last output; `token_ids` may then be empty (abort, error).
    A stop or end-of-sequence token that ended the choice stands last in `token_ids` and in `stop_token_id`.
    `error_code` and `error_message` are set when `finish_reason` is "error".
    """

    request_id: str
    choice: int
    seq: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error_code: str = ""
    error_message: str = ""
    facts: SequenceFacts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainTokens:
    """Outputs of one token and nothing else, as columns: most of what an engine says, at a tenth of what an object each would cost.

    Entry i: token `token_ids[i]` of choice `choices[i]` of `request_ids[i]`, at its output position `seqs[i]`.
    """

    request_ids: tuple[str, ...] = ()
    choices: tuple[int, ...] = ()
    seqs: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.request_ids) == len(self.choices) == len(self.seqs) == len(self.token_ids):
            raise ValueError("the columns differ in length")

    def outputs(self) -> Iterator[TokenOutput]:
        """The same as objects."""
        for request_id, choice, seq, token_id in zip(self.request_ids, self.choices, self.seqs, self.token_ids, strict=True):
            yield TokenOutput(request_id=request_id, choice=choice, seq=seq, token_ids=(token_id,))


class PlainColumns:
    """Gathers `PlainTokens`."""

    __slots__ = ("_choices", "_request_ids", "_seqs", "_token_ids")

    def __init__(self, first: PlainTokens = PlainTokens()) -> None:
        self._request_ids, self._choices = list(first.request_ids), list(first.choices)
        self._seqs, self._token_ids = list(first.seqs), list(first.token_ids)

    def add(self, request_id: str, choice: int, seq: int, token_id: int) -> None:
        """The next token."""
        self._request_ids.append(request_id)
        self._choices.append(choice)
        self._seqs.append(seq)
        self._token_ids.append(token_id)

    def take(self) -> PlainTokens:
        """What was gathered; begins anew."""
        taken = PlainTokens(
            request_ids=tuple(self._request_ids),
            choices=tuple(self._choices),
            seqs=tuple(self._seqs),
            token_ids=tuple(self._token_ids),
        )
        self._request_ids, self._choices, self._seqs, self._token_ids = [], [], [], []
        return taken


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One step in numbers. Block counts: free + evictable + used = the pool. `num_wasted_slots`: slots of used blocks that hold no
    computed token. Tokens are those computed, dropped ones of sequences that had ended included. Preemptions, prefix tokens (looked up,
    found) and `schedule_ns` are of what was decided in this step: where steps are launched ahead, the step after."""

    step: int
    started_ns: int
    ended_ns: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_evictable_blocks: int
    num_used_blocks: int
    num_wasted_slots: int
    num_preemptions: int
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int
    schedule_ns: int
    execute_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What one step said: at most one output a choice, in `outputs` or in `plain`. Also sent empty: step progress is the sign of life."""

    outputs: tuple[TokenOutput, ...]
    stats: StepStats
    plain: PlainTokens = PlainTokens()

    def every(self) -> tuple[TokenOutput, ...]:
        """All of its outputs as objects."""
        return (*self.plain.outputs(), *self.outputs)

    def packed(self) -> "StepOutput":
        """The same with every output in `plain` that can be there."""
        rest = []
        plain = PlainColumns(self.plain)
        for output in self.outputs:
            if output.facts is None and output.finish_reason is None and output.logprobs is None and len(output.token_ids) == 1:
                plain.add(output.request_id, output.choice, output.seq, output.token_ids[0])
            else:
                rest.append(output)
        if len(rest) == len(self.outputs):
            return self
        return StepOutput(outputs=tuple(rest), stats=self.stats, plain=plain.take())


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What a ready engine is; sent once in HELLO."""

    model: str
    architecture: str
    dtype: str
    kv_cache_dtype: str
    device: str
    operators: str
    operators_reason: str
    quantize: str
    attention_backend: str
    max_model_len: int
    vocab_size: int
    hidden_size: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    weight_bytes: int
    kv_cache_bytes: int
    load_s: float
    num_threads: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProgress:
    """Where a starting engine is; `fraction` of the phase in [0, 1]."""

    phase: Phase
    fraction: float
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFailure:
    """Why an engine ends; the last thing that it says. `field` names the setting at fault, where one is."""

    code: str
    message: str
    field: str = ""
    retriable: bool = True
