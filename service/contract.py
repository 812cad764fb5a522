"""What a transport hands to `generation.py`, and the events that come back: the border between the transports and the one use case.

Kafka, gRPC and HTTP translate their messages to and from these types (`wire.py`) and know nothing else of each other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from opentelemetry.context import Context

from engine import FinishReason
from service.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFields:
    """The caller's sampling fields; None is "absent": generation_config.json decides, then the defaults of `SamplingParams`.

    Ranges are checked when the engine's `SamplingParams` is built; `stop` holds strings and stays in the service.
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None
    n: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRequest:
    """What is asked. Exactly one of `text`, `messages` ((role, content) pairs) and `token_ids` is set."""

    text: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None
    token_ids: tuple[int, ...] | None = None
    model: str = ""
    sampling: SamplingFields = SamplingFields()
    label: str = ""
    ttl_ms: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)


def _is_count(digits: str) -> bool:
    return digits.isascii() and digits.isdigit() and len(digits) <= 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a durable prompt record stands."""

    topic: str
    partition: int
    offset: int
    request_id: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "request_id", f"{self.topic}-{self.partition}-{self.offset}")

    @classmethod
    def of(cls, request_id: str) -> "Source | None":
        """What a request id names; None for one of another form."""
        topic, *numbers = request_id.rsplit("-", 2)
        if len(numbers) != 2 or not topic or not all(_is_count(number) for number in numbers):
            return None
        return cls(topic=topic, partition=int(numbers[0]), offset=int(numbers[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobEntry:
    """One token with its text; `top` holds (token id, text, logprob), best first."""

    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """How it is asked: who, through which transport, by when, and what was said before.

    `parent` is the trace context that the `chat` span hangs on (the transport's own span). `deadline_ns` is CLOCK_MONOTONIC,
    0 for none. `waits`: wait for room at admission (Kafka, which holds back by itself) instead of being refused with
    `overloaded`; `weight` is its share of the room against others who wait. `said` and `seed` continue an earlier attempt;
    `said_logprobs`, one a token or none, come back in the result.
    """

    request_id: str
    transport: str
    parent: Context
    tenant: str = ""
    deadline_ns: int = 0
    waits: bool = False
    weight: int = 1
    source: Source | None = None
    epoch: int = 0
    attempt: int = 1
    said: tuple[tuple[int, ...], ...] = ()
    said_logprobs: tuple[tuple[LogprobEntry, ...], ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of a whole request; every choice's completion tokens are summed."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Milliseconds, from admission on; see house words: TPOT = (last - first) / (n - 1)."""

    queue_ms: float
    ttft_ms: float
    tpot_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceResult:
    """One whole continuation. `text` ends before a stop string; `token_ids` are all that were said."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[LogprobEntry, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The request was accepted; exactly one terminal event (`Finished` or `Failed`) will follow."""

    request_id: str
    model: str
    seed: int
    prompt_tokens: int
    trace_id: str
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """Tokens of one choice, in order. `seq` numbers the first from 0; `text_offset` counts the choice's characters before `text`.

    Text may lag behind tokens: characters that are not whole, or that may begin a stop string, are held back.
    """

    choice: int
    seq: int
    token_ids: tuple[int, ...]
    text: str
    text_offset: int
    logprobs: tuple[LogprobEntry, ...] | None = None
    finish_reason: FinishReason | None = None

    def merged_with(self, later: "Delta") -> "Delta":
        """Both as one; `later` is the next of the same choice."""
        logprobs = None
        if self.logprobs is not None or later.logprobs is not None:
            logprobs = (self.logprobs or ()) + (later.logprobs or ())
        return Delta(
            choice=self.choice,
            seq=self.seq,
            token_ids=self.token_ids + later.token_ids,
            text=self.text + later.text,
            text_offset=self.text_offset,
            logprobs=logprobs,
            finish_reason=later.finish_reason or self.finish_reason,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Every choice has ended. The authoritative whole."""

    choices: tuple[ChoiceResult, ...]
    usage: Usage
    timings: Timings
    seed: int
    trace_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The request ended without a whole answer; `choices` holds what was said until then."""

    error: RequestError
    choices: tuple[ChoiceResult, ...]
    usage: Usage
    timings: Timings
    seed: int
    trace_id: str


Event = Started | Delta | Finished | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Reset:
    """A durable request goes on under another owner, of this epoch. Tokens from `resume_from` on (one number a choice) that were given
    before are void, and come anew: none, where the number is how many were given."""

    epoch: int
    resume_from: tuple[int, ...]


ReaderEvent = Event | Reset
"""What a reader of a durable request gets."""
