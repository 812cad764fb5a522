"""Folds the messages of one stream, over all its attempts, into what its reader sees: each token once, in order.

Guarantees: tokens and text that were seen before are dropped, whichever attempt repeats them; a gap is a `ProtocolError`, never
silence; `said` and `seed` are what another attempt needs. Pure: no gRPC call, no clock.
"""

from schemas.v1 import inference_pb2
from service.contract import ChoiceResult, Delta, Finished, LogprobEntry, Started
from service.wire_results import logprobs_of, timings_of, usage_of


class ProtocolError(Exception):
    """The service broke the stream's promise; nothing after it can be trusted."""


class _Choice:
    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.logprobs: list[LogprobEntry] | None = None
        self.ended = False


class StreamFold:
    """The state of one stream of `num_choices` choices."""

    def __init__(self, num_choices: int) -> None:
        self._choices = [_Choice() for _ in range(num_choices)]
        self._announced = False
        self.request_id = ""
        self.seed: int | None = None

    @property
    def said(self) -> tuple[tuple[int, ...], ...]:
        """The tokens received, one entry a choice."""
        return tuple(tuple(choice.token_ids) for choice in self._choices)

    def take(self, message: inference_pb2.StreamEvent) -> Started | Delta | Finished | None:
        """What the reader is to see of `message`; None for nothing. Raises `ProtocolError`."""
        kind = message.WhichOneof("event")
        if kind == "started":
            return self._started(message)
        if kind == "delta":
            return self._delta(message.seq, message.delta)
        if kind == "finished":
            return self._finished(message.finished)
        # Heartbeats say nothing; `failed` and `reset` are followed by the call's status, which decides.
        return None

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
        if delta.choice >= len(self._choices):
            raise ProtocolError(f"choice {delta.choice} was not asked for")
        choice = self._choices[delta.choice]
        if choice.ended:
            return None
        known_tokens, known_text = len(choice.token_ids) - seq, len(choice.text) - delta.text_offset
        if known_tokens < 0 or known_text < 0:
            raise ProtocolError(f"choice {delta.choice} lacks tokens before {seq} or text before {delta.text_offset}")
        token_ids, text = tuple(delta.token_ids[known_tokens:]), delta.text[known_text:]
        logprobs = logprobs_of(delta.logprobs[known_tokens:]) if delta.logprobs else None
        reason = inference_pb2.FinishReason.Name(delta.finish_reason) if delta.finish_reason else None
        if not token_ids and not text and reason is None:
            return None
        seen = Delta(
            choice=delta.choice,
            seq=len(choice.token_ids),
            token_ids=token_ids,
            text=text,
            text_offset=len(choice.text),
            logprobs=logprobs,
            finish_reason=reason,  # type: ignore[arg-type]
        )
        choice.token_ids.extend(token_ids)
        choice.text += text
        choice.ended = reason is not None
        if logprobs is not None:
            choice.logprobs = (choice.logprobs or []) + list(logprobs)
        return seen

    def _finished(self, finished: inference_pb2.Finished) -> Finished:
        if len(finished.choices) != len(self._choices):
            raise ProtocolError(f"{len(finished.choices)} of {len(self._choices)} choices have ended")
        return Finished(
            choices=tuple(self._result(end) for end in finished.choices),
            usage=usage_of(finished.usage),
            timings=timings_of(finished.timings),
            seed=finished.seed,
            trace_id=finished.trace_id,
        )

    def _result(self, end: inference_pb2.ChoiceEnd) -> ChoiceResult:
        if end.index >= len(self._choices):
            raise ProtocolError(f"choice {end.index} was not asked for")
        choice = self._choices[end.index]
        return ChoiceResult(
            index=end.index,
            text=choice.text[: end.text_length],
            token_ids=tuple(choice.token_ids),
            finish_reason=inference_pb2.FinishReason.Name(end.finish_reason),  # type: ignore[arg-type]
            logprobs=None if choice.logprobs is None else tuple(choice.logprobs),
        )
