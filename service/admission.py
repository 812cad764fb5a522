"""Who enters, when, and by whose turn: the intake's bounds.

With `engine_process.py` this is the asyncio scheduler of the pipeline: this decides who enters and when, that drives the engine.
Bounds: requests and tokens (prompt + n x max_tokens) admitted and unfinished. A direct call that does not fit is refused at once with
`overloaded` and the time after which room is likely; a caller that waits stands in a line of its tenant and weight, first come first
served. Lines share the room by deficit round robin (Shreedhar & Varghese, 1996) in tokens, weighted: neither many prompts nor large
ones get a tenant more than its share. Those who wait may fill `WAITING_SHARE` of the bounds, so that a backlog on a topic leaves room
for direct calls. Guarantee: what a ticket holds is given back exactly once. Knows no text and no engine.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from service.config import AdmissionSection
from service.errors import Code, RequestError

WAITING_SHARE = 0.875
MIN_RETRY_S = 0.1
MAX_RETRY_S = 60.0
MAX_WAITING = 8192
_STAY_HALF_LIFE_ENDS = 32
_NS = 1e9


class Ticket:
    """Room that one request holds. `release` is idempotent."""

    __slots__ = ("_admission", "_entered_ns", "_held", "tokens")

    def __init__(self, admission: "Admission", tokens: int, entered_ns: int) -> None:
        self._admission = admission
        self._entered_ns = entered_ns
        self._held = True
        self.tokens = tokens

    def release(self) -> None:
        if self._held:
            self._held = False
            self._admission._give_back(self.tokens, self._entered_ns)


@dataclass(slots=True, eq=False)
class _Waiter:
    request_id: str
    line: tuple[str, int]
    tokens: int
    turn: asyncio.Future[Ticket] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(slots=True, eq=False)
class _Line:
    """Those of one tenant and weight who wait, and the tokens that they may enter with now. A round adds `weight` tokens."""

    weight: int
    credit: int = 0
    waiters: deque[_Waiter] = field(default_factory=deque)


class Admission:
    """One intake. `concurrency`: requests that the engine runs at once; those beyond it wait inside the engine.

    `clock` counts monotonic nanoseconds, as deadlines do.
    """

    def __init__(
        self, section: AdmissionSection, *, concurrency: int = 64, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._max_requests = section.max_requests
        self._max_tokens = section.max_tokens
        self._concurrency = concurrency
        self._clock = clock
        self._lines: OrderedDict[tuple[str, int], _Line] = OrderedDict()
        self._draining = False
        self._stays_s = 0.0
        self._num_stays = 0.0
        self._inside = 0.0
        self.num_requests = 0
        self.num_tokens = 0
        self.num_waiting = 0

    @property
    def draining(self) -> bool:
        return self._draining

    async def enter(
        self, request_id: str, tenant: str, tokens: int, *, deadline_ns: int = 0, waits: bool = False, weight: int = 1
    ) -> Ticket:
        """A ticket for `tokens`; release it when the request has ended. `weight`: its line's share of the room against others'.

        Raises `RequestError`: `draining`; `too_many_tokens` for what could never fit; `deadline_exceeded` when the estimated
        wait, or the wait itself, passes the deadline; `overloaded` when there is no room and the caller does not wait, or too
        many wait already; `cancelled` by `cancel`.
        """
        if self._draining:
            raise RequestError("draining", "this replica is stopping")
        share = WAITING_SHARE if waits else 1.0
        if tokens > self._max_tokens * share:
            limit = int(self._max_tokens * share)
            raise RequestError("too_many_tokens", f"prompt + n x max_tokens is {tokens}; admission.max_tokens allows {limit}")
        if deadline_ns and (wait_s := self.estimated_wait_s(tokens)) > (deadline_ns - self._clock()) / _NS:
            raise RequestError("deadline_exceeded", f"the estimated wait of {wait_s:.1f} s passes the deadline")
        if self._fits(tokens, share) and not (waits and self.num_waiting):
            return self._admit(tokens)
        if not waits or self.num_waiting >= MAX_WAITING:
            retry_after_s = min(max(self.estimated_wait_s(tokens), MIN_RETRY_S), MAX_RETRY_S)
            message = "too many prompts wait already" if waits else "the intake is full"
            raise RequestError("overloaded", message, retry_after_s=retry_after_s)
        return await self._wait(_Waiter(request_id, (tenant, weight), tokens), deadline_ns)

    def cancel(self, request_id: str, code: Code = "cancelled") -> bool:
        """Ends a wait; False when that request does not wait here."""
        for line in self._lines.values():
            for waiter in line.waiters:
                if waiter.request_id == request_id and not waiter.turn.done():
                    waiter.turn.set_exception(RequestError(code, "ended while it waited to enter"))
                    return True
        return False

    def drain(self) -> None:
        """From now on nobody enters; those who wait are told `draining`. Idempotent."""
        self._draining = True
        for line in self._lines.values():
            for waiter in line.waiters:
                if not waiter.turn.done():
                    waiter.turn.set_exception(RequestError("draining", "this replica is stopping"))

    def estimated_wait_s(self, tokens: int) -> float:
        """Seconds until a request of `tokens` would start, from how long those that ended stayed; 0 before one has ended.

        By Little's law as many leave within a mean stay as were inside when it was measured, or as the engine runs at once if it was not
        full: this is the share of them that must leave before the request fits, or waits ahead of it inside the engine, whichever is
        more. Meant to err low, for a wait ends at its deadline
        anyhow, whereas what is refused is lost: time in which nothing ends does not make the measure worse, since prompts that entered
        together end together.
        """
        if not self._num_stays or not self.num_requests:
            return 0.0
        queued = sum(waiter.tokens for line in self._lines.values() for waiter in line.waiters)
        too_many = self.num_tokens + queued + tokens - self._max_tokens
        # First what is inside leaves, then what comes in behind it, which may be more.
        to_fit = min(too_many / max(self.num_tokens, 1), 1.0) + max(0, too_many - self.num_tokens) / self._max_tokens
        leaving = max(self._concurrency, self._inside / self._num_stays)
        if self.num_requests >= self._max_requests:
            to_fit = max(to_fit, (self.num_requests + self.num_waiting + 1 - self._max_requests) / leaving)
        in_engine = (self.num_requests + 1 - self._concurrency) / leaving
        return max(0.0, to_fit, in_engine) * self._stays_s / self._num_stays

    async def _wait(self, waiter: _Waiter, deadline_ns: int) -> Ticket:
        line = self._lines.setdefault(waiter.line, _Line(weight=waiter.line[1]))
        line.waiters.append(waiter)
        self.num_waiting += 1
        timer = None
        if deadline_ns:
            timer = asyncio.get_running_loop().call_later((deadline_ns - self._clock()) / _NS, _expire, waiter.turn)
        try:
            return await waiter.turn
        except BaseException:
            # A turn that came in the same moment as the end of the wait must not be lost.
            if waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
                waiter.turn.result().release()
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._leave_line(waiter)

    def _leave_line(self, waiter: _Waiter) -> None:
        line = self._lines.get(waiter.line)
        if line is not None and waiter in line.waiters:
            line.waiters.remove(waiter)
            self.num_waiting -= 1
            if not line.waiters:
                del self._lines[waiter.line]
            # It may have stood before others that fit.
            self._admit_waiting()

    def _fits(self, tokens: int, share: float) -> bool:
        return (
            self.num_requests < max(1, int(self._max_requests * share)) and self.num_tokens + tokens <= self._max_tokens * share
        )

    def _admit(self, tokens: int) -> Ticket:
        self.num_requests += 1
        self.num_tokens += tokens
        return Ticket(self, tokens, self._clock())

    def _give_back(self, tokens: int, entered_ns: int) -> None:
        # Aged by ends, not by time: what was measured stays as good as it was while nothing ends.
        keep = 0.5 ** (1 / _STAY_HALF_LIFE_ENDS)
        self._stays_s = self._stays_s * keep + (self._clock() - entered_ns) / _NS
        self._num_stays = self._num_stays * keep + 1
        self._inside = self._inside * keep + self.num_requests
        self.num_requests -= 1
        self.num_tokens -= tokens
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        while self._lines and not self._draining:
            name, line = next(iter(self._lines.items()))
            waiter = line.waiters[0]
            if not waiter.turn.done():
                if waiter.tokens > line.credit:
                    self._next_line()
                    continue
                # No one overtakes whose turn it is: else a large prompt would wait for ever behind small ones.
                if not self._fits(waiter.tokens, WAITING_SHARE):
                    return
                line.credit -= waiter.tokens
                waiter.turn.set_result(self._admit(waiter.tokens))
            line.waiters.popleft()
            self.num_waiting -= 1
            if not line.waiters:
                del self._lines[name]
            elif line.waiters[0].tokens > line.credit:
                self._lines.move_to_end(name)

    def _next_line(self) -> None:
        """Puts a line whose first has credit at the head: the next in turn, after as many rounds as it takes until there is one."""
        rounds = min(-(-(line.waiters[0].tokens - line.credit) // line.weight) for line in self._lines.values())
        for line in self._lines.values():
            line.credit += max(rounds, 0) * line.weight
        for name, line in tuple(self._lines.items()):
            if line.waiters[0].tokens <= line.credit:
                break
            self._lines.move_to_end(name)


def _expire(turn: "asyncio.Future[Ticket]") -> None:
    if not turn.done():
        turn.set_exception(RequestError("deadline_exceeded", "the deadline passed while it waited to enter"))
