"""The systems' end of the benchmark's wire: JSON lines on standard input and output. Standard library only.

{"op": "load", ...options}             -> {"facts": {...}, "load_s": s}
{"op": "run", "case": name, "prompts": [[id, ...], ...], "new_tokens": n, "keep": bool}
                                       -> {"first_s", "total_s", "window_s", "window_tokens", "step_s": [...], "tokens": [[id, ...], ...]}
{"op": "probe"}                        -> what the system's `probe` gives (machine_probe.py alone has one)
{"op": "close"}                        -> end

Greedy, end of sequence ignored. `keep` allows a system to hold the KV of these prompts for the next run of the same case: the
driver sends the same prompts again then. Whatever libraries print goes to standard error. An exception is answered with
{"error": "Type: message"} and ends nothing.
"""

import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class Recorder:
    """When each sequence's tokens came, reduced to what is compared.

    The window runs from the moment when every sequence has its first token to the moment when the first one has its last: in it
    the whole batch decodes, whatever order a system prefills in. All times in seconds since the recorder was made.
    """

    def __init__(self, num_seqs: int, new_tokens: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._new_tokens = new_tokens
        self._counts = [0] * num_seqs
        self._events: list[tuple[float, int]] = []
        self._first_s = self._end_s = 0.0
        self._start = clock()

    def step(self, tokens: Mapping[int, int]) -> None:
        """A step gave `tokens[i]` further tokens to sequence i. Call it as soon as the tokens are there."""
        now = self._clock() - self._start
        waiting = any(count == 0 for count in self._counts)
        for i, num in tokens.items():
            self._counts[i] += num
            if self._counts[i] >= self._new_tokens and not self._end_s:
                self._end_s = now
        if waiting and all(self._counts):
            self._first_s = now
        self._events.append((now, sum(tokens.values())))

    def result(self) -> dict[str, Any]:
        """Raises ValueError when a sequence did not get exactly the tokens asked for."""
        if any(count != self._new_tokens for count in self._counts):
            raise ValueError(f"sequences got {sorted(set(self._counts))} tokens, not {self._new_tokens}")
        inside = [event for event in self._events if self._first_s < event[0] <= self._end_s]
        stamps = [self._first_s, *(at for at, _ in inside)]
        return {
            "first_s": self._first_s,
            "total_s": self._events[-1][0],
            "window_s": max(0.0, self._end_s - self._first_s),
            "window_tokens": sum(num for _, num in inside),
            "step_s": [round(late - early, 6) for early, late in itertools.pairwise(stamps)],
        }


class System(Protocol):
    """What a file of this folder implements."""

    def facts(self) -> dict[str, Any]:
        """Versions, instruction sets, thread count: what a reader needs to trust the figures."""
        ...

    def run(self, case: str, prompts: list[list[int]], new_tokens: int, keep: bool, recorder: Recorder) -> list[list[int]]:
        """Continues every prompt by `new_tokens`, telling `recorder` each step; returns the tokens."""
        ...


class Probing(Protocol):
    """The one system that is no engine: the machine."""

    def facts(self) -> dict[str, Any]: ...

    def probe(self) -> dict[str, Any]:
        """What it measures, by name."""
        ...


def serve(load: Callable[[dict[str, Any]], Any]) -> None:
    """Answers until "close" or the end of the input. `load` gets the load message's options; gives a `System` or a `Probing`."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    system: Any = None
    for line in sys.stdin:
        message = json.loads(line)
        if message["op"] == "close":
            break
        try:
            if message["op"] == "load":
                start = time.perf_counter()
                system = load(message)
                answer = {"load_s": time.perf_counter() - start, "facts": system.facts()}
            elif message["op"] == "probe":
                answer = system.probe()
            else:
                prompts = message["prompts"]
                recorder = Recorder(len(prompts), message["new_tokens"])
                tokens = system.run(message["case"], prompts, message["new_tokens"], message["keep"], recorder)
                answer = recorder.result() | {"tokens": tokens}
        except Exception as error:  # noqa: BLE001 - the driver is told, whatever it was
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".strip()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
