"""One continuation of a request as text: tokens in, deltas out, up to its end.

Guarantee: the deltas' texts, joined, are the choice's text; their tokens its tokens; nothing follows the delta that carries the
finish reason. A stop string ends the choice with the token that completes it; the text ends before it. A stop token's own text is
not shown. Held back: what is no whole character yet, or may begin a stop string.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine import FinishReason, TokenLogprobs, TokenOutput
from service.contract import ChoiceResult, Delta, LogprobEntry
from service.detokenization import StopStringMatcher, TokenPieces
from service.tokenization import Tokenization


@dataclass(frozen=True, slots=True, kw_only=True)
class EndRules:
    """What ends a choice: strings and tokens, neither of them before `min_tokens`, and `max_tokens`."""

    stop: tuple[str, ...]
    stop_token_ids: frozenset[int]
    min_tokens: int
    max_tokens: int


class Choice:
    """The state of one choice. `finish_reason` None: it goes on."""

    def __init__(self, index: int, tokenization: Tokenization, rules: EndRules, *, with_logprobs: bool) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._closing: Delta | None = None
        self._rules = rules
        self._pieces = tokenization.pieces
        self._detokenizer = tokenization.detokenizer()
        self._matcher = StopStringMatcher(rules.stop)
        self._texts: list[str] = []
        self._text_length = 0
        self._logprobs: list[LogprobEntry] | None = [] if with_logprobs else None

    def replay(self, said: Sequence[int], logprobs: Sequence[LogprobEntry] = ()) -> None:
        """Takes tokens that an earlier attempt said; its deltas had their texts, so none are given. They may end the choice."""
        if self._logprobs is not None:
            self._logprobs += logprobs
        reason: FinishReason | None = None
        for token_id in said:
            count = len(self.token_ids) + 1
            if token_id in self._rules.stop_token_ids and count > self._rules.min_tokens:
                self.token_ids.append(token_id)
                reason = "stop"
                break
            self._show(self._push(token_id))
            if self._matcher.matched is not None:
                reason = "stop"
                break
        if reason is None and len(self.token_ids) >= self._rules.max_tokens:
            reason = "length"
        if reason is not None:
            self._closing = self.end(reason)

    def closing_delta(self) -> Delta:
        """The last delta of a choice that `replay` ended: no tokens, what had been held back, and the reason."""
        if self._closing is None:
            raise RuntimeError("what was replayed did not end this choice")
        return self._closing

    def take(self, output: TokenOutput) -> Delta:
        """What an engine output adds. Call it only while the choice goes on."""
        seq, offset = len(self.token_ids), self._text_length
        text, taken = self._said(output)
        if self._matcher.matched is not None:
            self.finish_reason = "stop"
        elif output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            text += self._flush()
        self._show(text)
        return Delta(
            choice=self.index,
            seq=seq,
            token_ids=tuple(output.token_ids[:taken]),
            text=text,
            text_offset=offset,
            logprobs=self._take_logprobs(output.logprobs, taken),
            finish_reason=self.finish_reason,
        )

    def end(self, reason: FinishReason) -> Delta:
        """Ends a choice that goes on, without further tokens; what was held back is shown."""
        self.finish_reason = reason
        offset, text = self._text_length, self._flush()
        self._show(text)
        return Delta(
            choice=self.index, seq=len(self.token_ids), token_ids=(), text=text, text_offset=offset, finish_reason=reason
        )

    def result(self) -> ChoiceResult:
        """The whole, once it has ended."""
        return ChoiceResult(
            index=self.index,
            text="".join(self._texts),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason or "error",
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
        )

    def _said(self, output: TokenOutput) -> tuple[str, int]:
        """The text of an output's tokens, and how many count: those up to the one that completes a stop string."""
        has_text = len(output.token_ids) - (output.stop_token_id is not None)
        if not self._rules.stop:
            self.token_ids += output.token_ids
            return self._detokenizer.push(*output.token_ids[:has_text]), len(output.token_ids)
        texts = []
        for position, token_id in enumerate(output.token_ids[:has_text]):
            texts.append(self._push(token_id))
            if self._matcher.matched is not None:
                return "".join(texts), position + 1
        self.token_ids += output.token_ids[has_text:]
        return "".join(texts), len(output.token_ids)

    def _push(self, token_id: int) -> str:
        self.token_ids.append(token_id)
        may_stop = len(self.token_ids) >= self._rules.min_tokens
        return self._matcher.push(self._detokenizer.push(token_id), may_stop=may_stop)

    def _flush(self) -> str:
        if self._matcher.matched is not None:
            return ""
        # The end of the text may complete a stop string with U+FFFD only, which no one asked to stop at.
        return self._matcher.push(self._detokenizer.finish(), may_stop=False) + self._matcher.finish()

    def _show(self, text: str) -> None:
        if text:
            self._texts.append(text)
            self._text_length += len(text)

    def _take_logprobs(self, logprobs: tuple[TokenLogprobs, ...] | None, taken: int) -> tuple[LogprobEntry, ...] | None:
        if self._logprobs is None or logprobs is None:
            return None
        entries = tuple(as_entry(entry, self._pieces) for entry in logprobs[:taken])
        self._logprobs += entries
        return entries


def as_entry(entry: TokenLogprobs, pieces: TokenPieces) -> LogprobEntry:
    """A token's log probability with texts."""
    return LogprobEntry(
        token_id=entry.token_id,
        token=pieces.text(entry.token_id),
        logprob=entry.logprob,
        top=tuple((token_id, pieces.text(token_id), logprob) for token_id, logprob in entry.top),
    )


@dataclass(slots=True)
class PendingDelta:
    """Deltas of one choice that nobody has read yet, merged: bounded by the choice's own length."""

    first: Delta
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[LogprobEntry] | None = None
    finish_reason: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self.token_ids += delta.token_ids
        self.texts.append(delta.text)
        if delta.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason

    def merged(self) -> Delta:
        return Delta(
            choice=self.first.choice,
            seq=self.first.seq,
            token_ids=tuple(self.token_ids),
            text="".join(self.texts),
            text_offset=self.first.text_offset,
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
            finish_reason=self.finish_reason,
        )
