"""Runs the blocks: in each, every system takes its turn at one case, in an order drawn anew, the machine probed before.

A system is stopped whenever it is not its turn. A turn during which other processes used more than `MAX_FOREIGN` of the cores, or
the hypervisor took more than `MAX_STOLEN`, is marked disturbed. Where `busy` processes are wanted beside the systems, they run during
turns and are none of the others.
"""

import contextlib
import os
import random
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import psutil

from tests.bench.peers.build import Unavailable
from tests.bench.peers.cases import CASES, Case, Prompts
from tests.bench.peers.catalogue import CATALOGUE, SCRIPTS, start_of
from tests.bench.peers.machine import Clock, description, foreign_share
from tests.bench.peers.process import SystemFailed, SystemProcess
from tests.servers.tied import tie, tied_directory

MAX_FOREIGN, MAX_STOLEN = 0.05, 0.03
HOLD_S = 75.0

Json = dict[str, Any]


class HoldError(RuntimeError):
    """The machine cannot be had. One line."""


class Hold:
    """The machine for ourselves, where it is shared through a command that waits for its turn and then runs its arguments.

    Held from turn to turn while `HOLD_S` lasts, then given back and asked for again, so that others get theirs.
    """

    def __init__(self, command: str) -> None:
        self._command = shlex.split(command)
        self._holder: subprocess.Popen[bytes] | None = None
        self._since = 0.0

    def take(self) -> None:
        """Returns once the machine is held; at once without a command. Raises `HoldError` when the command ends without a hold."""
        if not self._command or (self._holder is not None and time.monotonic() - self._since < HOLD_S):
            return
        self.give_back()
        self._holder = subprocess.Popen([*self._command, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        tie(self._holder.pid)
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._holder.stdin.write(b"held\n")
        if self._holder.stdout.readline() != b"held\n":
            raise HoldError(f"{shlex.join(self._command)} does not give the machine: exit code {self._holder.wait()}")
        self._since = time.monotonic()

    def give_back(self) -> None:
        """Idempotent."""
        if self._holder is not None:
            try:
                self._holder.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                self._holder.kill()  # it still waited for its turn
                self._holder.communicate()
            self._holder = None


class Bench:
    """The systems that run, and those that cannot. Use as a context: it ends their processes."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        model: str,
        threads: int,
        seed: int,
        quiet_with: str = "",
        favour: bool = False,
        busy: int = 0,
    ) -> None:
        self._names = names
        self._model = model
        self._threads = threads
        self._seed = seed
        self._hold = Hold(quiet_with)
        self._favour = favour
        self._num_busy = busy
        self._busy: list[psutil.Process] = []
        self._stack = ExitStack()
        self._running: dict[str, SystemProcess] = {}
        self.systems: dict[str, Json] = {}
        self.probe_facts: Json = {}

    def __enter__(self) -> "Bench":
        with self._stack:
            self._logs = self._stack.enter_context(tied_directory("sluice-bench-"))
            self._stack.callback(self._hold.give_back)
            self._probe = self._start([sys.executable, str(SCRIPTS / "machine_probe.py")], dict(os.environ), "machine-probe")
            self.probe_facts = self._probe.ask(
                {"op": "load", "threads": self._threads, "last_level_cache_bytes": description()["last_level_cache_bytes"]}
            )["facts"]
            for name in self._names:
                self.systems[name] = self._load(name)
            for _ in range(self._num_busy):
                self._busy.append(self._start_busy())
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, command: Sequence[str], environment: dict[str, str], name: str) -> SystemProcess:
        process = SystemProcess(command, environment, self._logs / f"{name}.log", favour=self._favour)
        self._stack.callback(process.close)
        return process

    def _start_busy(self) -> psutil.Process:
        process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        tie(process.pid)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        process.send_signal(signal.SIGSTOP)
        return psutil.Process(process.pid)

    def _load(self, name: str) -> Json:
        """What the result says of a system."""
        entry = CATALOGUE[name]
        said: Json = {"label": entry.label, "kind": entry.kind, "bits": entry.bits}
        start = start_of(name, self._model, self._threads)
        if isinstance(start, Unavailable):
            return said | {"unavailable": start.reason}
        said |= start.described()
        process = self._start(start.command, dict(start.environment), name)
        _tell(f"loading {entry.label} …")
        try:
            answer = process.ask({"op": "load", **start.options})
        except SystemFailed as failure:
            process.close()
            _tell(f"{entry.label} is unavailable: {failure}")
            return said | {"unavailable": str(failure)}
        self._running[name] = process
        return said | {
            "facts": answer["facts"],
            "load_s": round(answer["load_s"], 2),
            "left_out": dict.fromkeys(entry.without, entry.why),
            "packages": {key: value for key, value in start.versions.items() if key in ("torch", "transformers", "numpy")},
        }

    def prepare(self, case: Case) -> None:
        """A first run of each system, so that contexts exist and kept prompts are computed."""
        for name in self._takes_part(case):
            _tell(f"preparing {CATALOGUE[name].label} for {case.name} …")
            said = self._turn(name, case, case.prompts(self._seed, -1))
            if "failed" in said:
                self._note_failure(name, case, said["failed"])

    def block(self, case: Case, index: int) -> Json:
        """One block of a case."""
        order = self._takes_part(case)
        random.Random(f"{self._seed}/{case.name}/{index}").shuffle(order)
        prompts = case.prompts(self._seed, index)
        self._hold.take()
        if self._favour:
            self._probe.favour()
        probe = self._probe.ask({"op": "probe"})
        turns = {name: self._turn(name, case, prompts) for name in order}
        base = turns.get("sluice", {}).get("tokens")
        for name, turn in turns.items():
            if "failed" in turn:
                self._note_failure(name, case, turn["failed"])
            if "tokens" in turn:
                said = turn.pop("tokens")
                turn["first_tokens_as_sluice"] = _share_of_equal_firsts(said, base) if base else None
        return {
            "case": case.name,
            "block": index,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "probe": probe,
            "order": order,
            "turns": turns,
        }

    def _note_failure(self, name: str, case: Case, reason: str) -> None:
        # It takes part in nothing from here on; without a word here its absence would say nothing.
        self.systems[name].setdefault("failed", {})[case.name] = reason

    def _takes_part(self, case: Case) -> list[str]:
        return [name for name in self._running if case.name not in CATALOGUE[name].without]

    def _turn(self, name: str, case: Case, prompts: Prompts) -> Json:
        process = self._running[name]
        message = {"op": "run", "case": case.name, "prompts": prompts, "new_tokens": case.new_tokens, "keep": case.keep}
        self._hold.take()
        if self._favour:
            process.favour()
        for busy in self._busy:
            busy.resume()
        mine, cpu, busy_s, before = time.process_time(), process.cpu_s(), self._busy_s(), Clock.now()
        try:
            answer = process.ask(message)
        except SystemFailed as failure:
            _tell(f"{CATALOGUE[name].label} failed at {case.name}: {failure}")
            del self._running[name]
            process.close()
            return {"failed": str(failure)}
        finally:
            after, busy_s = Clock.now(), self._busy_s() - busy_s
            for busy in self._busy:
                busy.suspend()
        own = process.cpu_s() - cpu + time.process_time() - mine + busy_s
        foreign, stolen = foreign_share(before, after, own, len(os.sched_getaffinity(0)))
        return answer | {
            "foreign_share": foreign,
            "stolen_share": stolen,
            "disturbed": foreign > MAX_FOREIGN or stolen > MAX_STOLEN,
        }

    def _busy_s(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._busy)


def run(bench: Bench, cases: Sequence[str], indices: Sequence[int], blocks: list[Json]) -> Exception | None:
    """Every block of every case, each added to `blocks` once it is whole. Blocks are the outer loop: what drifts, drifts for all alike.

    Interrupted (Ctrl-C, SIGTERM) it returns early; so it does with what went wrong (a machine that is not given, a probe that ended),
    since what was measured by then is worth having.
    """
    prepared: set[str] = set()
    try:
        for index in indices:
            for name in cases:
                if name not in prepared:
                    bench.prepare(CASES[name])
                    prepared.add(name)
                _tell(f"block {index}: {name} …")
                blocks.append(bench.block(CASES[name], index))
    except KeyboardInterrupt:
        _tell(f"interrupted after {len(blocks)} blocks")
    except (HoldError, SystemFailed) as error:
        return error
    except Exception as error:  # noqa: BLE001 - nobody measures for an hour again because of what came after
        traceback.print_exc()
        return error
    return None


def _share_of_equal_firsts(said: list[list[int]], base: list[list[int]]) -> float:
    equal = sum(mine[:1] == theirs[:1] for mine, theirs in zip(said, base, strict=True))
    return round(equal / len(base), 3)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
