"""Folds the messages of one stream, over all its attempts, into what its reader sees: each token once, in order.

Guarantees: tokens and text that were seen before are dropped, whichever attempt repeats them; a gap is a `ProtocolError`, never
silence; `said` and `seed`, or `counts`, are what another attempt needs. A `Reset` is given only where
it voids what was seen. Pure: no gRPC call, no clock.
"""

from collections.abc import Sequence

from engine.request import MAX_CHOICES
from schemas.v1 import inference_pb2
from service.contract import ChoiceResult, Delta, Finished, LogprobEntry, Reset, Started
from service.wire import logprobs_from_proto
from service.wire_results import timings_of, usage_of


class ProtocolError(Exception):
    """The service broke the stream's promise; nothing after it can be trusted."""


class _Choice:
    """`token_ids` are those from `base` on; `text` begins at `text_start` characters, None while no delta has told."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.token_ids: list[int] = []
        self.text_start: int | None = None if base else 0
        self.text = ""
        self.logprobs: list[LogprobEntry] | None = None
        self.ended = False
        self.voided = False

    @property
    def count(self) -> int:
        return self.base + len(self.token_ids)

    @property
    def text_count(self) -> int:
        # Where its text is to be cut is not known before the next delta: all that there is may come.
        return 0 if self.voided else -1 if self.text_start is None else self.text_start + len(self.text)

    def void(self, kept: int) -> None:
        """Tokens from `kept` on come anew; their delta tells where the text is cut."""
        del self.token_ids[max(0, kept - self.base) :]
        if self.logprobs is not None:
            del self.logprobs[len(self.token_ids) :]
        self.base = min(self.base, kept)
        self.ended, self.voided = False, True

    def text_from(self, offset: int) -> int:
        """Characters of a delta's text, which begins at `offset`, that are known already; below 0 when some are missing."""
        if self.text_start is None:
            self.text_start = offset
        if self.voided:
            self.voided = False
            self.text = self.text[: max(0, offset - self.text_start)]
        return self.text_start + len(self.text) - offset


class StreamFold:
    """The state of one stream."""

    def __init__(self, num_choices: int | None, after: Sequence[int] = ()) -> None:
        """`num_choices` None: as many as come. `after`: tokens that the reader has from before, one number a choice."""
        self._after = tuple(after)
        self._most = MAX_CHOICES if num_choices is None else num_choices
        self._least = num_choices or 0
        self._choices: list[_Choice] = []
        self._choice(max(self._least, len(self._after)) - 1)
        self._announced = False
        self.request_id = ""
        self.seed: int | None = None
        self.failed = False
        """Whether the service has said that the request failed, which the call's status explains."""

    @property
    def said(self) -> tuple[tuple[int, ...], ...]:
        """The tokens received, one entry a choice."""
        return tuple(tuple(choice.token_ids) for choice in self._choices)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens that the reader has, those from before included, one number a choice."""
        return tuple(choice.count for choice in self._choices)

    @property
    def text_counts(self) -> tuple[int, ...]:
        """Characters that the reader has, one number a choice; -1 where it does not know."""
        return tuple(choice.text_count for choice in self._choices)

    def _choice(self, index: int) -> _Choice | None:
        while len(self._choices) <= index:
            position = len(self._choices)
            self._choices.append(_Choice(self._after[position] if position < len(self._after) else 0))
        return self._choices[index] if index >= 0 else None

    def take(self, message: inference_pb2.StreamEvent) -> Started | Delta | Reset | Finished | None:
        """What the reader is to see of `message`; None for nothing. Raises `ProtocolError`."""
        kind = message.WhichOneof("event")
        if kind == "started":
            return self._started(message)
        if kind == "delta":
            return self._delta(message.seq, message.delta)
        if kind == "finished":
            return self._finished(message.finished)
        if kind == "reset":
            return self._reset(message)
        # Heartbeats say nothing; `failed` is followed by the call's status, which decides.
        self.failed = self.failed or kind == "failed"
        return None

    def _reset(self, message: inference_pb2.StreamEvent) -> Reset | None:
        """Announces a hand-over; the reader hears of it only where tokens that it has seen are void."""
        kept = message.reset.resume_from
        voided = [choice for choice, count in zip(self._choices, kept, strict=False) if count < choice.count]
        for choice, count in zip(self._choices, kept, strict=False):
            if count < choice.count:
                choice.void(count)
        return Reset(epoch=message.epoch, resume_from=self.counts) if voided else None

    def _started(self, message: inference_pb2.StreamEvent) -> Started | None:
        started = message.started
        self.request_id = message.request_id
        if self.seed is not None and self.seed != started.seed:
            raise ProtocolError("the stream was taken up with another seed")
        self.seed = started.seed
        if self._announced:
            return None
        self._announced = True
        return Started(
            request_id=message.request_id,
            model=started.model,
            seed=started.seed,
            prompt_tokens=started.prompt_tokens,
            trace_id=started.trace_id,
        )

    def _delta(self, seq: int, delta: inference_pb2.Delta) -> Delta | None:
        choice = self._asked(delta.choice)
        if choice.ended:
            return None
        known_tokens, known_text = choice.count - seq, choice.text_from(delta.text_offset)
        if known_tokens < 0 or known_text < 0:
            raise ProtocolError(f"choice {delta.choice} lacks tokens before {seq} or text before {delta.text_offset}")
        token_ids, text = tuple(delta.token_ids[known_tokens:]), delta.text[known_text:]
        logprobs = logprobs_from_proto(delta.logprobs[known_tokens:]) if delta.logprobs else None
        reason = inference_pb2.FinishReason.Name(delta.finish_reason) if delta.finish_reason else None
        if not token_ids and not text and reason is None:
            return None
        seen = Delta(
            choice=delta.choice,
            seq=choice.count,
            token_ids=token_ids,
            text=text,
            text_offset=(choice.text_start or 0) + len(choice.text),
            logprobs=logprobs,
            finish_reason=reason,  # type: ignore[arg-type]
        )
        choice.token_ids.extend(token_ids)
        choice.text += text
        choice.ended = reason is not None
        if logprobs is not None:
            choice.logprobs = (choice.logprobs or []) + list(logprobs)
        return seen

    def _asked(self, index: int) -> _Choice:
        choice = self._choice(index) if index < self._most else None
        if choice is None:
            raise ProtocolError(f"choice {index} was not asked for")
        return choice

    def _finished(self, finished: inference_pb2.Finished) -> Finished:
        if len(finished.choices) < self._least:
            raise ProtocolError(f"{len(finished.choices)} of {self._least} choices have ended")
        return Finished(
            choices=tuple(self._result(end) for end in finished.choices),
            usage=usage_of(finished.usage),
            timings=timings_of(finished.timings),
            seed=finished.seed,
            trace_id=finished.trace_id,
        )

    def _result(self, end: inference_pb2.ChoiceEnd) -> ChoiceResult:
        choice = self._asked(end.index)
        return ChoiceResult(
            index=end.index,
            text=choice.text[: max(0, end.text_length - (choice.text_start or 0))],
            token_ids=tuple(choice.token_ids),
            finish_reason=inference_pb2.FinishReason.Name(end.finish_reason),  # type: ignore[arg-type]
            logprobs=None if choice.logprobs is None else tuple(choice.logprobs),
        )
