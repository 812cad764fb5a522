"""What the engine owes: every outstanding request, what it has said, and who may enter the child.

Duty: tokens are handed on exactly once and in order, whatever dies (`accept` compares sequence numbers with what was said); after
a death everything outstanding goes to the next child with the tokens it had said. A death is no prompt's fault until proven: who
was in the child becomes a suspect, and suspects re-enter one at a time, beside none but those already cleared, and nothing new
enters meanwhile. A suspect is cleared by a token beyond the point where the last child died, so this takes a prefill each, not a
generation. One whose child dies before that ends with `crash_loop`; so does one that was there at `MAX_DEATHS` deaths, however
far it came between them. A poison prompt so costs two deaths, and its neighbours a pause.

The child is never given more than it takes: of what waits, nothing enters that would bring the open choices inside above `most_inside`.

Pure state: no I/O, no clock, no tasks; one owner, `EngineProcess`. Bounded by admission, which bounds what is submitted.
"""

import operator
from collections.abc import Iterable
from dataclasses import replace
from typing import cast

from engine import FinishReason, PlainTokens, Request, StepOutput, TokenOutput
from engine.errors import FrameError

MAX_DEATHS = 4


class _Entry:
    """One outstanding request."""

    __slots__ = ("aborted", "deaths", "ended", "moved", "request", "said", "suspect")

    def __init__(self, request: Request) -> None:
        choices = request.sampling.n
        self.request = request
        self.said: list[list[int]] = [list(ids) for ids in request.output_token_ids] or [[] for _ in range(choices)]
        self.ended = set(request.ended_choices)
        self.moved: set[int] = set()
        """Of a suspect: choices that said a token since it was submitted again."""
        self.suspect = False
        self.deaths = 0
        self.aborted = False

    @property
    def open_choices(self) -> list[int]:
        return [choice for choice in range(self.request.sampling.n) if choice not in self.ended]

    def as_request(self) -> Request:
        """The request as the next child must see it: with everything that was said."""
        if not any(self.said) and not self.ended:
            return self.request
        return replace(
            self.request,
            output_token_ids=tuple(tuple(ids) for ids in self.said),
            ended_choices=tuple(sorted(self.ended)),
        )


class EngineLedger:
    """Outstanding requests: those in the child and those waiting to enter it, each in order of arrival."""

    def __init__(self, most_inside: int) -> None:
        """`most_inside`: open choices that the child holds without refusing one; a request that has more enters alone."""
        self._most_inside = most_inside
        self._num_open = 0
        """Choices inside that go on."""
        self._inside: dict[str, _Entry] = {}
        self._waiting: dict[str, _Entry] = {}
        self._saying: dict[tuple[str, int], list[int]] = {}
        """What each choice inside that goes on and is no suspect's has said, by request and choice."""
        self._probation = False

    def __len__(self) -> int:
        return len(self._inside) + len(self._waiting)

    @property
    def num_inside(self) -> int:
        return len(self._inside)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Raises `ValueError` when the id is outstanding already."""
        if request.request_id in self._inside or request.request_id in self._waiting:
            raise ValueError(f"request {request.request_id} is outstanding already")
        self._waiting[request.request_id] = _Entry(request)

    def take(self) -> list[Request]:
        """What may enter the child now; it counts as in the child from here on.

        In order of arrival, as many as the child holds. While there are suspects: the oldest of them, once no other is inside.
        """
        entering = list(self._waiting.values())
        if self._probation:
            suspects = [entry for entry in entering if entry.suspect]
            if any(entry.suspect for entry in self._inside.values()):
                return []
            self._probation = bool(suspects)
            entering = suspects[:1] or entering
        entered = []
        for entry in entering:
            num_open = len(entry.open_choices)
            if self._inside and self._num_open + num_open > self._most_inside:
                break
            del self._waiting[entry.request.request_id]
            self._inside[entry.request.request_id] = entry
            self._num_open += num_open
            entry.moved.clear()
            if not entry.suspect:
                self._trust(entry)
            entered.append(entry.as_request())
        return entered

    def abort(self, request_id: str) -> tuple[bool, tuple[TokenOutput, ...]]:
        """Whether the child must be told, and the ends that can be said here and now because the child does not hold it."""
        inside = self._inside.get(request_id)
        if inside is not None:
            first, inside.aborted = not inside.aborted, True
            return first, ()
        waiting = self._waiting.get(request_id)
        return False, () if waiting is None else self._end(waiting, "cancelled")

    def accept(self, step: StepOutput) -> StepOutput:
        """Of a step, what has not been handed on before: `step` itself where that is all of it.

        Raises `FrameError`, and takes nothing, when a token is skipped.
        """
        lists = self._continued(step.plain)
        outputs = step.every() if lists is None else step.outputs
        self._check(outputs)
        if lists is None:
            return StepOutput(outputs=self._accept(outputs), stats=step.stats)
        for said, token_id in zip(lists, step.plain.token_ids, strict=True):
            said.append(token_id)
        accepted = self._accept(outputs)
        return step if accepted is outputs else StepOutput(outputs=accepted, stats=step.stats, plain=step.plain)

    def _continued(self, plain: PlainTokens) -> list[list[int]] | None:
        """The lists that these tokens are the next of; None unless that holds for each of them, which it nearly always does."""
        choices = list(zip(plain.request_ids, plain.choices, strict=True))
        lists = list(map(self._saying.get, choices))
        if None in lists or len(set(choices)) < len(choices):
            return None
        found = cast(list[list[int]], lists)
        return found if tuple(map(len, found)) == plain.seqs else None

    def _trust(self, entry: _Entry) -> None:
        for choice in entry.open_choices:
            self._saying[entry.request.request_id, choice] = entry.said[choice]

    def _accept(self, outputs: tuple[TokenOutput, ...]) -> tuple[TokenOutput, ...]:
        accepted = []
        for output in outputs:
            entry = self._inside.get(output.request_id)
            if entry is None or output.choice in entry.ended:
                continue
            new = _new_part(output, len(entry.said[output.choice]))
            if new.token_ids:
                entry.said[output.choice] += new.token_ids
                entry.moved.add(output.choice)
            if new.finish_reason is not None:
                entry.ended.add(new.choice)
                self._num_open -= 1
                self._saying.pop((new.request_id, new.choice), None)
                self._settle(entry)
            elif entry.suspect:
                self._settle(entry)
            if new.token_ids or new.finish_reason is not None:
                accepted.append(new)
        whole = len(accepted) == len(outputs) and all(map(operator.is_, accepted, outputs))
        return outputs if whole else tuple(accepted)

    def _check(self, outputs: Iterable[TokenOutput]) -> None:
        """Raises `FrameError` before any of a step's outputs is counted as said: what is not handed on must come again."""
        counts: dict[tuple[str, int], int] = {}
        for output in outputs:
            entry = self._inside.get(output.request_id)
            if entry is None:
                continue
            if not 0 <= output.choice < len(entry.said):
                raise FrameError(f"an output names choice {output.choice} of a request that has {len(entry.said)}")
            if output.choice in entry.ended:
                continue
            key = (output.request_id, output.choice)
            said = counts.get(key, len(entry.said[output.choice]))
            if output.token_ids and output.seq > said:
                raise FrameError(f"an output starts at token {output.seq}, but {said} were said")
            counts[key] = max(said, output.seq + len(output.token_ids))

    def _settle(self, entry: _Entry) -> None:
        open_choices = entry.open_choices
        if not open_choices:
            del self._inside[entry.request.request_id]
        elif entry.suspect and entry.moved.issuperset(open_choices):
            entry.suspect = False
            self._trust(entry)

    def child_died(self) -> tuple[TokenOutput, ...]:
        """Everything leaves the dead child. Gives the ends of requests that were aborted or are proven to be the cause."""
        ends: list[TokenOutput] = []
        present = list(self._inside.values())
        self._waiting = self._inside | self._waiting
        self._inside = {}
        self._num_open = 0
        self._saying.clear()
        self._probation = self._probation or bool(present)
        for entry in present:
            proven = entry.suspect  # `take` never lets two suspects in at once
            entry.suspect = True
            entry.deaths += 1
            if entry.aborted:
                ends += self._end(entry, "cancelled")
            elif proven or entry.deaths >= MAX_DEATHS:
                ends += self._end(
                    entry, "error", "crash_loop", f"the engine ended {entry.deaths} times while it ran this request"
                )
        return tuple(ends)

    def end_one(self, request_id: str, code: str, message: str) -> tuple[TokenOutput, ...]:
        """Ends of a request that the child cannot be given."""
        entry = self._inside.get(request_id) or self._waiting.get(request_id)
        return () if entry is None else self._end(entry, "error", code, message)

    def end_all(self, code: str, message: str) -> tuple[TokenOutput, ...]:
        """Ends of everything: there will be no engine."""
        entries = [*self._inside.values(), *self._waiting.values()]
        return tuple(end for entry in entries for end in self._end(entry, "error", code, message))

    def _end(self, entry: _Entry, reason: FinishReason, code: str = "", message: str = "") -> tuple[TokenOutput, ...]:
        for choice in entry.open_choices:
            self._saying.pop((entry.request.request_id, choice), None)
        if self._inside.pop(entry.request.request_id, None) is not None:
            self._num_open -= len(entry.open_choices)
        self._waiting.pop(entry.request.request_id, None)
        return tuple(
            TokenOutput(
                request_id=entry.request.request_id,
                choice=choice,
                seq=len(entry.said[choice]),
                token_ids=(),
                finish_reason=reason,
                error_code=code,
                error_message=message,
            )
            for choice in entry.open_choices
        )


def _new_part(output: TokenOutput, said: int) -> TokenOutput:
    """What of an output, which skips nothing, follows the `said` tokens of its choice."""
    if output.seq == said or not output.token_ids:
        return output
    known = said - output.seq
    logprobs = None if output.logprobs is None else output.logprobs[known:]
    return replace(output, seq=said, token_ids=output.token_ids[known:], logprobs=logprobs)
