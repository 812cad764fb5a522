"""`sluice serve` as a process of its own, for benchmarks that look at it from outside."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.servers.tied import tie

START_TIMEOUT_S = 300.0


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
def serving(*arguments: str) -> Iterator[Served]:
    """The service with any free ports, ended with SIGTERM. Raises RuntimeError with the end of its log when it does not start."""
    flags = ["serve", "--json", "--set", "grpc.port=0", "--set", "admin.port=0", *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", "from service.cli.main import main; main()", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SLUICE_LOGGING__LEVEL": "warning"},
    )
    tie(process.pid)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            assert process.stderr is not None
            raise RuntimeError(f"sluice serve did not start:\n{process.stderr.read()[-2000:]}")
        said = json.loads(line)
        yield Served(
            grpc=said["grpc"],
            kafka=said["kafka"],
            process=psutil.Process(process.pid),
            ready_s=time.perf_counter() - start,
            load_s=said["load_s"],
        )
    finally:
        process.terminate()
        process.communicate(timeout=60)


def resident_bytes(process: psutil.Process) -> int:
    """Proportional set size: shared pages count by their share."""
    return int(process.memory_full_info().pss)


def model_bytes(directory: Path) -> int:
    """Of the weight files."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
