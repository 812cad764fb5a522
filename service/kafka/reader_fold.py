"""What one reader is shown of a durable request: the chunk topic's records, over all attempts and owners, folded into one sequence.

Guarantees: each token of each choice is given once, in order, from `after` on, whatever is repeated, late or written by an owner
that was replaced; nothing is passed over: where records are missing, the tokens wait for the result, which has them all. Only where
a new owner says other tokens than were given already (which the same seed and position rule out, but for rounding) does a `Reset`
void some. Text begins after what the reader has, or after what the tokens before `after` make; where that is not known it may begin
earlier: `text_offset` says where.
Pure: knows no client, no clock.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from engine.request import MAX_CHOICES
from schemas.v1 import events_pb2, inference_pb2
from service.contract import Delta, LogprobEntry, ReaderEvent, Reset, Started
from service.kafka.chunk_records import ChunkMessage
from service.wire import logprobs_from_proto
from service.wire_results import ending_of

NumCharacters = Callable[[str, Sequence[int]], int | None]
"""Characters that the first tokens of a choice make by the tokenizer of the model of this name; None where it is not here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminal:
    """A terminal record. `traceparent`: what its headers say of the trace."""

    result: inference_pb2.Result
    traceparent: str = ""


@dataclass(slots=True)
class _Choice:
    """`said[:valid]` are the present attempt's; what stands after it was said by an earlier one and not confirmed yet."""

    given: int
    said: list[int | None] = field(default_factory=list)
    valid: int = 0
    text_given: int | None = None
    """Characters given; None while it is not known where the text of the first `given` tokens ends."""
    can_seek: bool = False
    """Whether the first `given` tokens will tell where their text ends."""


class ReaderFold:
    """The state of one reader. Feed it with `take`, in the order of the log; a `Terminal` ends it."""

    def __init__(
        self,
        request_id: str,
        after: Sequence[int] = (),
        after_text: Sequence[int] = (),
        *,
        num_characters: NumCharacters = lambda model, token_ids: None,
    ) -> None:
        """`after`: tokens that the reader has, one number a choice; `after_text`: characters, below 0 where it does not say."""
        self._request_id = request_id
        self._after, self._after_text = tuple(after), tuple(after_text)
        self._num_characters, self._model = num_characters, ""
        self._choices: list[_Choice] = []
        self._speaker = (-1, 0)
        self._announced = False
        self.traceparent = ""
        """Of the latest attempt; "" while none is known."""
        self.ended = False

    @property
    def given(self) -> tuple[int, ...]:
        """Tokens that the reader has, one count a choice."""
        counts = [choice.given for choice in self._choices]
        return (*counts, *self._after[len(counts) :])

    def join(self, chunk: events_pb2.Chunk) -> None:
        """For a reader that comes in the middle, before `take`: what stands before this chunk is taken as given. Else nothing."""
        if self._announced or chunk.choice >= MAX_CHOICES:
            return
        self._speaker = max(self._speaker, (chunk.epoch, chunk.attempt))
        choice = self._choice(chunk.choice)
        if not choice.said and choice.given < chunk.seq:
            choice.said, choice.valid = [None] * chunk.seq, chunk.seq
            choice.given, choice.text_given = chunk.seq, chunk.text_offset

    def take(self, message: ChunkMessage | Terminal) -> Iterator[ReaderEvent]:
        """What the reader is to see of it."""
        if self.ended:
            return
        if isinstance(message, Terminal):
            self.traceparent = self.traceparent or message.traceparent
            yield from self._end(message.result)
        elif isinstance(message, events_pb2.Started):
            yield from self._start(message)
        elif isinstance(message, events_pb2.Chunk):
            yield from self._chunk(message)
        # A Handover says only that nothing more comes of its attempt.

    def _choice(self, index: int) -> _Choice:
        while len(self._choices) <= index:
            position = len(self._choices)
            given = self._after[position] if position < len(self._after) else 0
            text_given = self._after_text[position] if position < len(self._after_text) else -1
            known = 0 if given == 0 else text_given if text_given >= 0 else None
            self._choices.append(_Choice(given, text_given=known, can_seek=known is None))
        return self._choices[index]

    def _start(self, started: events_pb2.Started) -> Iterator[ReaderEvent]:
        speaker = (started.epoch, started.attempt)
        if speaker <= self._speaker:
            return
        self._speaker, self._model = speaker, started.model
        self.traceparent = started.traceparent or self.traceparent
        resume_from = list(started.resume_from)[:MAX_CHOICES]
        for index in range(max(1, len(resume_from), len(self._choices))):
            choice, kept = self._choice(index), resume_from[index] if index < len(resume_from) else 0
            if choice.valid < kept <= choice.given:
                # Records from before are gone, but the reader has their tokens.
                choice.said += [None] * (kept - len(choice.said))
                choice.valid = kept
            choice.valid = min(choice.valid, kept)
            # What nobody was shown needs no comparison.
            del choice.said[max(choice.valid, choice.given) :]
        if self._announced:
            yield Reset(epoch=started.epoch, resume_from=self.given)
            return
        self._announced = True
        yield Started(
            request_id=self._request_id,
            model=started.model,
            seed=started.seed,
            prompt_tokens=started.prompt_tokens,
            trace_id=_trace_id(started.traceparent),
            epoch=started.epoch,
        )

    def _chunk(self, chunk: events_pb2.Chunk) -> Iterator[ReaderEvent]:
        if (chunk.epoch, chunk.attempt) != self._speaker or chunk.choice >= MAX_CHOICES:
            # Of an owner that was replaced; or of one whose `Started` is gone: the result has what it says.
            return
        choice = self._choice(chunk.choice)
        known = choice.valid - chunk.seq
        if known < 0:
            return
        end = chunk.seq + len(chunk.token_ids)
        yield from self._confirm(chunk.choice, chunk.token_ids[known:])
        logprobs = (
            logprobs_from_proto(chunk.logprobs) if len(chunk.logprobs) == len(chunk.token_ids) and chunk.logprobs else None
        )
        if end <= choice.given and choice.text_given is None:
            # The reader has all of these tokens, and so their text.
            if end == choice.given:
                choice.text_given = chunk.text_offset + len(chunk.text)
            return
        delta = self._give(chunk.choice, chunk.seq, chunk.token_ids, chunk.text, chunk.text_offset, logprobs)
        if delta is not None:
            yield delta

    def _confirm(self, index: int, token_ids: Sequence[int]) -> Iterator[Reset]:
        """Takes the next tokens of the present attempt; a `Reset` where they differ from what the reader was given."""
        choice = self._choice(index)
        for token_id in token_ids:
            if choice.valid < len(choice.said) and choice.said[choice.valid] not in (None, token_id):
                yield from self._void(index, choice.valid)
            if choice.valid == len(choice.said):
                choice.said.append(token_id)
            choice.said[choice.valid] = token_id
            choice.valid += 1
        self._seek(choice)

    def _seek(self, choice: _Choice) -> None:
        """Finds where the text of what the reader has ends, once its tokens are known."""
        if choice.can_seek and choice.valid >= choice.given:
            choice.can_seek = False
            known = [token_id for token_id in choice.said[: choice.given] if token_id is not None]
            if len(known) == choice.given:
                choice.text_given = self._num_characters(self._model, known)

    def _void(self, index: int, position: int) -> Iterator[Reset]:
        choice = self._choice(index)
        del choice.said[position:]
        if position < choice.given:
            choice.given, choice.text_given, choice.can_seek = position, None, False
            yield Reset(epoch=max(self._speaker[0], 0), resume_from=self.given)

    def _give(
        self,
        index: int,
        seq: int,
        token_ids: Sequence[int],
        text: str,
        text_offset: int,
        logprobs: tuple[LogprobEntry, ...] | None,
    ) -> Delta | None:
        """The part of these tokens and this text that the reader lacks."""
        choice = self._choice(index)
        skip = max(0, choice.given - seq)
        cut = 0 if choice.text_given is None else max(0, choice.text_given - text_offset)
        new_ids, new_text = tuple(token_ids[skip:]), text[cut:]
        if not new_ids and not new_text:
            return None
        delta = Delta(
            choice=index,
            seq=choice.given,
            token_ids=new_ids,
            text=new_text,
            text_offset=text_offset + min(cut, len(text)),
            logprobs=None if logprobs is None else logprobs[skip:],
        )
        choice.given += len(new_ids)
        choice.text_given = max(text_offset + len(text), choice.text_given or 0)
        return delta

    def _end(self, result: inference_pb2.Result) -> Iterator[ReaderEvent]:
        ending = ending_of(result)
        self._model = result.model
        if not self._announced and ending.choices:
            self._announced = True
            yield Started(
                request_id=self._request_id,
                model=result.model,
                seed=result.seed,
                prompt_tokens=result.usage.prompt_tokens,
                trace_id=result.trace_id,
                epoch=result.epoch,
            )
        for said in ending.choices:
            choice = self._choice(said.index)
            choice.valid = 0
            yield from self._confirm(said.index, said.token_ids)
            yield from self._void(said.index, len(said.token_ids))
            delta = self._give(said.index, 0, said.token_ids, said.text, 0, said.logprobs)
            # The text may end before what an attempt had shown: `text_length` of the end says so.
            yield Delta(
                choice=said.index,
                seq=choice.given if delta is None else delta.seq,
                token_ids=() if delta is None else delta.token_ids,
                text="" if delta is None else delta.text,
                text_offset=choice.text_given or 0 if delta is None else delta.text_offset,
                logprobs=None if delta is None else delta.logprobs,
                finish_reason=said.finish_reason,
            )
        self.ended = True
        yield ending


def _trace_id(traceparent: str) -> str:
    parts = traceparent.split("-")
    return parts[1] if len(parts) >= 4 else ""
