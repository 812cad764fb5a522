"""How fast this machine reads memory and multiplies matrices just now, through torch.

`probe` gives {"read_gb_per_s", "read_gb_per_s_one_thread", "fp32_gflop_per_s", "bf16_gflop_per_s"}: the best of a few short
attempts, since what is asked for is a limit.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import torch

READ_BYTES, CACHES = 2**28, 4
"""The least that is read, and how many times the last-level cache it is at least."""

SHAPE = (512, 576, 1536)
"""A prefill chunk against SmolLM2's gate: rows, K, N."""


def read_bytes(cache_bytes: int, memory_bytes: int) -> int:
    """How much is read, so that it comes from memory: four last-level caches, unless that is more than an eighth of the memory."""
    return min(max(READ_BYTES, CACHES * cache_bytes), memory_bytes // 8) // 8 * 8


class Probe:
    """Options: `threads`, and `last_level_cache_bytes` of the machine."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._threads = options["threads"]
        self._bytes = read_bytes(options["last_level_cache_bytes"], os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        self._block = torch.ones(self._bytes // 8, dtype=torch.int64)
        rows, k, n = SHAPE
        self._pairs = {
            name: (torch.randn(rows, k, dtype=dtype), torch.randn(k, n, dtype=dtype))
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        }

    def facts(self) -> dict[str, Any]:
        return {
            "torch": torch.__version__,
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "threads": self._threads,
            "read_bytes": self._bytes,
        }

    def probe(self) -> dict[str, float]:
        figures = {}
        for threads, name in ((self._threads, "read_gb_per_s"), (1, "read_gb_per_s_one_thread")):
            torch.set_num_threads(threads)
            figures[name] = round(self._bytes / _best_s(self._block.sum, 4) / 1e9, 1)
        torch.set_num_threads(self._threads)
        flop = 2 * SHAPE[0] * SHAPE[1] * SHAPE[2]
        for name, (a, b) in self._pairs.items():
            figures[f"{name}_gflop_per_s"] = round(flop / _best_s(lambda a=a, b=b: a @ b, 6) / 1e9, 1)
        return figures


def _best_s(call: Callable[[], object], attempts: int) -> float:
    best = float("inf")
    for _ in range(attempts):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
