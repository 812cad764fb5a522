"""What a test or benchmark started ends with it, however it ends."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

PATIENCE_S = 30.0
STARTED = """
import signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from tests.servers.tied import tie, tied_directory

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored

def start():
    # It leads a session, and has a child of its own in it.
    process = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True, start_new_session=True)
    tie(process.pid)
    return process.pid, int(process.stdout.readline())

with tied_directory("sluice-tied-") as directory:
    # The thread that started them ends at once.
    with ThreadPoolExecutor(1) as pool:
        pids = pool.submit(start).result()
    print(*pids, directory, flush=True)
    end = sys.argv[1]
    if end == "wait":
        time.sleep(600)
    assert end != "raise"
"""


def await_end(pid: int) -> None:
    """Fails when the process is still there after a while. (A zombie has ended: who reaps it is another's matter.)"""
    deadline = time.monotonic() + PATIENCE_S
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


def run(end: str) -> "tuple[subprocess.Popen[str], list[int], Path]":
    """A process that has tied two others and a directory."""
    command = [sys.executable, "-c", STARTED, end]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    *pids, directory = process.stdout.readline().split()
    return process, [int(pid) for pid in pids], Path(directory)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGINT])
def test_nothing_stays_when_it_is_killed(number: signal.Signals) -> None:
    process, pids, directory = run("wait")
    with process:
        assert all(psutil.pid_exists(pid) for pid in pids)
        assert directory.is_dir()
        process.send_signal(number)
        process.wait(PATIENCE_S)
        for pid in pids:
            await_end(pid)
        deadline = time.monotonic() + PATIENCE_S
        while directory.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize(("end", "code"), [("return", 0), ("raise", 1)])
def test_nothing_stays_when_it_ends_by_itself(end: str, code: int) -> None:
    process, pids, directory = run(end)
    with process:
        assert process.wait(PATIENCE_S) == code
    # The guard was waited for.
    assert [psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids] == [False, False]
    assert not directory.exists()


def command_lines(process: psutil.Process) -> dict[int, str]:
    """Of every process below it that has not just ended, by process id."""
    found = {}
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[child.pid] = " ".join(child.cmdline())
    return found


@pytest.mark.kafka
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_benchmark_takes_its_broker_and_its_service_along(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.kafka_path", "--prompts", "2000", "--modes", "at-least-once"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--sample-ratio", "0"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 240
        started: dict[int, str] = {}
        while not any("engine.worker" in line for line in started.values()):
            started = command_lines(psutil.Process(process.pid))
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert any("kafka.Kafka" in line for line in started.values())
    finally:
        process.send_signal(number)
        process.wait(PATIENCE_S)
    for pid in started:
        await_end(pid)
