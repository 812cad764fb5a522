"""What every benchmark says beside its figures: versions, commit, machine, how fast the machine was just then, and the spread."""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "numpy", "tokenizers", "aiokafka", "grpcio", "uvloop")


def environment() -> dict[str, Any]:
    """Versions, commit, machine, time and load. To be asked before measuring: the tree may change and the load rises meanwhile."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_1m": os.getloadavg()[0],
    }


def probe() -> dict[str, float]:
    """How fast this machine is at this moment: a read of 256 MiB and a bf16 matmul. Machines here are shared."""
    import torch

    block = torch.ones(64 * 2**20, dtype=torch.float32)
    a = torch.randn(1024, 1024, dtype=torch.bfloat16)
    b = torch.randn(1024, 1024, dtype=torch.bfloat16)
    read_s = min(seconds(block.sum) for _ in range(3))
    matmul_s = min(seconds(lambda: a @ b) for _ in range(5))
    return {
        "read_gb_per_s": round(block.numel() * 4 / read_s / 1e9, 1),
        "bf16_matmul_gflop_per_s": round(2 * 1024**3 / matmul_s / 1e9, 1),
    }


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: Sequence[float], digits: int = 2) -> dict[str, Any]:
    """Median and range of the blocks, with the blocks themselves, rounded for readers; `exact_median` is what targets compare."""
    return {
        "median": round(statistics.median(values), digits),
        "exact_median": statistics.median(values),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "blocks": [round(value, digits) for value in values],
    }


def exact_median(said: Mapping[str, Any]) -> float:
    """Of a `spread`; documents of before it was kept have the rounded one alone."""
    return float(said.get("exact_median", said["median"]))


def shown(value: float, bounds: Sequence[float], digits: int = 2) -> str:
    """`value` with `digits` decimals, or with as many more as leave it on its side of every bound: 0.8954 is no 0.90 where 0.9 is asked."""
    text = f"{value:.{digits}f}"
    for more in range(digits + 1, 17):
        if all((float(text) > bound) - (float(text) < bound) == (value > bound) - (value < bound) for bound in bounds):
            break
        text = f"{value:.{more}f}"
    return text


def quantiles(values: Sequence[float], digits: int = 2) -> dict[str, float]:
    """p50, p90 and p99 by nearest rank."""
    ordered = sorted(values)
    return {f"p{q}": round(ordered[-(-q * len(ordered) // 100) - 1], digits) for q in (50, 90, 99)}


def emit(name: str, parameters: dict[str, Any], results: dict[str, Any], began: dict[str, Any]) -> dict[str, Any]:
    """The report as one JSON object. `began`: the `environment` of before the benchmark."""
    return {"benchmark": name, "parameters": parameters, "results": results, "environment": began}


def at_least(least: int) -> Callable[[str], int]:
    """A type of argparse: whole numbers from `least` on."""

    def count(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return count


def counts(text: str) -> str:
    """A type of argparse: whole numbers from 1 on with commas between them, as they are."""
    for part in text.split(","):
        at_least(1)(part)
    return text


def above_zero(text: str) -> float:
    """A type of argparse: a number above 0 and finite."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


def print_report(report: dict[str, Any]) -> None:
    json.dump(report, sys.stdout, indent=1)
    sys.stdout.write("\n")


def _git(*arguments: str) -> str:
    """Its output; "" where there is no git or no repository, as in a copy of the tree."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
