"""Runs requests through an engine to their ends, and holds what every run must hold (I6, positions)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine.engine import Engine
from engine.output import SequenceFacts, StepStats, TokenLogprobs, TokenOutput
from engine.request import Request
from engine.stand_in import StandInEngine

MAX_STEPS = 20_000


@dataclass
class Said:
    """What one choice said in this run."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: str | None = None
    error_code: str = ""
    first_seq: int | None = None
    facts: list[SequenceFacts] = field(default_factory=list)


class Listener:
    """Collects outputs by (request, choice); fails on anything after an end, and on a gap or repeat in positions."""

    def __init__(self) -> None:
        self.said: dict[tuple[str, int], Said] = {}
        self.stats: list[StepStats] = []

    def hear(self, outputs: Iterable[TokenOutput]) -> None:
        for output in outputs:
            said = self.said.setdefault((output.request_id, output.choice), Said())
            if said.reason is not None:
                raise AssertionError(f"{output.request_id}/{output.choice} spoke after its end")
            if said.first_seq is None:
                said.first_seq = output.seq
            if output.seq != said.first_seq + len(said.tokens):
                raise AssertionError(f"{output.request_id}/{output.choice}: position {output.seq} does not follow")
            said.tokens += output.token_ids
            said.logprobs += output.logprobs or ()
            said.reason = output.finish_reason
            said.error_code = output.error_code
            if output.facts is not None:
                said.facts.append(output.facts)

    def tokens(self) -> dict[tuple[str, int], tuple[list[int], str | None]]:
        """(tokens, reason) of each choice."""
        return {key: (said.tokens, said.reason) for key, said in self.said.items()}


def step(engine: Engine | StandInEngine, listener: Listener) -> None:
    """One step, heard."""
    output = engine.step()
    listener.stats.append(output.stats)
    listener.hear(output.every())


def run(engine: Engine | StandInEngine, requests: Sequence[Request]) -> Listener:
    """Adds all, steps until nothing is left, checks that each choice ended."""
    listener = Listener()
    for request in requests:
        engine.add(request)
    for _ in range(MAX_STEPS):
        if not engine.has_work:
            break
        step(engine, listener)
    else:
        raise AssertionError(f"work left after {MAX_STEPS} steps")
    wanted = {(r.request_id, c) for r in requests for c in range(r.sampling.n) if c not in r.ended_choices}
    assert {key for key, said in listener.said.items() if said.reason} == wanted
    return listener
