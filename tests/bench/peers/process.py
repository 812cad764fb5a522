"""One system as a persistent process: asked in JSON lines, stopped between its turns, its processor time counted.

It leads a session of its own, so that its whole tree can be stopped with SIGSTOP: whatever an idle system would do (spin, poll, beat)
costs the others nothing.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests.servers.tied import tie

ANSWER_TIMEOUT_S = 900.0
"""A compiling or badly disturbed system takes minutes; one that takes longer hangs."""

_FAVOURED = -20
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class SystemFailed(RuntimeError):
    """The system answered with an error, or ended. One line."""


class SystemProcess:
    """Running until `close`; stopped unless it is asked something."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, *, favour: bool = False) -> None:
        """`favour`: from the start, so that it loads in good time too. Raises PermissionError without the right to."""
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                start_new_session=True,
                text=True,
            )
        tie(self._process.pid)
        if favour:
            self.favour()

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Wakes it, asks, and stops it again once it has answered. Raises `SystemFailed`."""
        self._signal(signal.SIGCONT)
        writer, reader = self._pipes()
        try:
            writer.write(json.dumps(message) + "\n")
            writer.flush()
            if not select.select([reader], [], [], ANSWER_TIMEOUT_S)[0]:
                raise SystemFailed(f"no answer within {ANSWER_TIMEOUT_S:g} s: {_last_line(self._log)}")
            line = reader.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemFailed(f"it ended with {self._process.wait()}: {_last_line(self._log)}")
        self._signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SystemFailed(answer["error"])
        return answer

    def favour(self) -> None:
        """Puts it before other processes (nice -20, of its scheduling group too where the kernel groups sessions).

        Raises PermissionError without the right to.
        """
        for process in self.members():
            directory = Path("/proc") / str(process)
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                (directory / "autogroup").write_text(str(_FAVOURED))
            for thread in (directory / "task").iterdir():
                with contextlib.suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, int(thread.name), _FAVOURED)

    def cpu_s(self) -> float:
        """Processor seconds of its processes so far, ended children of theirs included."""
        return sum(_process_cpu_s(process) for process in self.members())

    def close(self) -> None:
        """Ends its whole session."""
        self._signal(signal.SIGKILL)
        self._process.communicate()

    def members(self) -> list[int]:
        """Every process of its session."""
        session = self._process.pid
        return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _session(entry) == session]

    def _signal(self, number: signal.Signals) -> None:
        # Children may lead process groups of their own: the session is what holds them together.
        for process in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout


def _stat(process: Path) -> list[str]:
    """The fields of /proc/PID/stat from the third (state) on; empty once it is gone."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _session(process: Path) -> int:
    fields = _stat(process)
    return int(fields[3]) if fields else -1


def _process_cpu_s(process: int) -> float:
    fields = _stat(Path("/proc") / str(process))
    return sum(map(int, fields[11:15])) / _TICKS_PER_S if fields else 0.0


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
