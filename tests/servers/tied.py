"""Processes and directories of a test or benchmark that end with it, however it ends: returned, raised, SIGTERM, SIGHUP, SIGKILL.

Guarantee: within a moment of this process's end every tied process that still runs is killed, with its whole session where it leads
one, and every tied directory is removed. A guard process does it, told over a pipe that this process alone holds open: the kernel's
own signal at a parent's death (PR_SET_PDEATHSIG) comes when the *thread* ends that started the child, and brokers are started from
threads that end. Start times keep the guard from a process that has only the same number.
"""

import atexit
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_lock = threading.Lock()
_guard: "subprocess.Popen[bytes] | None" = None


def tie(pid: int) -> None:
    """Ties a process, best right after it was started."""
    _tell({"pid": pid, "started": _started(pid)})


@contextmanager
def tied_directory(prefix: str) -> Iterator[Path]:
    """A fresh directory, removed at the end of the block or of this process."""
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        _tell({"directory": str(directory)})
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _tell(what: dict[str, object]) -> None:
    global _guard
    with _lock:
        if _guard is None:
            # A session of its own: what is sent to our process group or terminal does not reach it.
            _guard = subprocess.Popen(
                [sys.executable, "-S", "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            atexit.register(_finish, _guard)
        assert _guard.stdin is not None
        _guard.stdin.write(json.dumps(what).encode() + b"\n")
        _guard.stdin.flush()


def _finish(guard: "subprocess.Popen[bytes]") -> None:
    assert guard.stdin is not None
    guard.stdin.close()
    guard.wait()


def _stat(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat from the third (state) on; empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _started(pid: int) -> str:
    fields = _stat(pid)
    return fields[19] if fields else ""


def _kill(pid: int, started: str) -> None:
    if not started or _started(pid) != started:
        return
    session = [int(name) for name in os.listdir("/proc") if name.isdigit() and (_stat(name)[3:4] or [""])[0] == str(pid)]
    for member in (pid, *session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def guard(lines: IO[bytes]) -> None:
    """Reads until whoever writes is gone, then ends what was tied."""
    tied = [json.loads(line) for line in lines]
    for one in tied:
        if "pid" in one:
            _kill(one["pid"], one["started"])
    for one in tied:
        if "directory" in one:
            shutil.rmtree(one["directory"], ignore_errors=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    guard(sys.stdin.buffer)
