"""`sluice serve` as a process of its own, for benchmarks that look at it from outside."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from tests.servers import kafka
from tests.servers.tied import tie

BROKER = {"broker_jvm": kafka.SHORT_LIVED, "broker_settings": kafka.TWO_CORES}
"""What a report says of `small_broker`."""
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A service that takes requests. `ready_s`: from exec to its own word that it is ready."""

    grpc: str
    kafka: str
    process: psutil.Process
    ready_s: float
    load_s: float

    @property
    def child(self) -> psutil.Process:
        """The engine."""
        [child] = self.process.children()
        return child


@contextmanager
def serving(*arguments: str, log: Path | None = None, start_timeout_s: float = START_TIMEOUT_S) -> Iterator[Served]:
    """The service with any free ports, ended with SIGTERM. Raises RuntimeError with the end of its log when it does not start.

    `log`: a new file that keeps what it says.
    """
    flags = ["serve", "--json", "--set", "grpc.port=0", "--set", "admin.port=0", *arguments]
    # No pipe: one that nobody reads would hold up a service that has much to say.
    with log.open("w+") if log else tempfile.TemporaryFile("w+") as words:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", "from service.cli.main import main; main()", *flags],
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            env=os.environ | {"SLUICE_LOGGING__LEVEL": "warning"},
        )
        tie(process.pid)
        try:
            yield _started(process, words, start, start_timeout_s)
        finally:
            process.terminate()
            try:
                process.communicate(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                raise


def _started(process: "subprocess.Popen[str]", words: IO[str], start: float, timeout_s: float) -> Served:
    late = threading.Timer(timeout_s, process.kill)
    late.daemon = True
    late.start()
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
    finally:
        late.cancel()
    if not line:
        process.wait()
        words.seek(0)
        raise RuntimeError(f"sluice serve did not start (exit status {process.returncode}):\n{words.read()[-2000:]}")
    said = json.loads(line)
    return Served(
        grpc=said["grpc"],
        kafka=said["kafka"],
        process=psutil.Process(process.pid),
        ready_s=time.perf_counter() - start,
        load_s=said["load_s"],
    )


def small_broker() -> AbstractContextManager[kafka.KafkaServer]:
    """A broker that shares two cores with what is measured."""
    return kafka.running("bench", kafka.SHORT_LIVED, kafka.TWO_CORES)


def resident_bytes(process: psutil.Process) -> int:
    """Proportional set size: shared pages count by their share."""
    return int(process.memory_full_info().pss)


def model_bytes(directory: Path) -> int:
    """Of the weight files."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
