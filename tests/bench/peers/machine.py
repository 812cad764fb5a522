"""What machine this is, and how fast it is just now: bandwidth and arithmetic beside every block, and who else was running."""

import os
import platform
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_INTERESTING = ("avx", "fma", "f16c", "amx", "bf16", "vnni", "asimd", "sve", "i8mm")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def description() -> dict[str, Any]:
    """Model, cores, instruction sets, caches."""
    flags: list[str] = []
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = sorted(flag for flag in value.split() if any(part in flag for part in _INTERESTING))
        elif name.strip() == "model name":
            model = value.strip()
    return {
        "cpu": model,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "instruction_sets": flags,
        "last_level_cache_bytes": _last_level_cache(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
    }


def _last_level_cache() -> int:
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1))
    return max(sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """The processor time of the cores that this process may use, at one moment, in seconds over all of them: spent on anything, and
    taken by the hypervisor."""

    at: float
    busy_s: float
    stolen_s: float

    @staticmethod
    def now() -> "Clock":
        busy, stolen = ticks_of(Path("/proc/stat").read_text(), os.sched_getaffinity(0))
        return Clock(at=time.perf_counter(), busy_s=busy / _TICKS_PER_S, stolen_s=stolen / _TICKS_PER_S)


def ticks_of(stat: str, cores: Collection[int]) -> tuple[int, int]:
    """Clock ticks in /proc/stat that these cores spent on anything, and that the hypervisor took from them.

    Raises RuntimeError where it does not name them all (lxcfs numbers them anew): nothing would count as disturbed.
    """
    wanted, busy, taken = {f"cpu{core}" for core in cores}, 0, 0
    for line in stat.splitlines():
        name, *fields = line.split()
        if name in wanted:
            user, nice, system, _, _, irq, softirq, stolen = map(int, fields[:8])
            busy += user + nice + system + irq + softirq
            taken += stolen
            wanted.remove(name)
    if wanted:
        raise RuntimeError(f"/proc/stat does not count {', '.join(sorted(wanted))}")
    return busy, taken


def foreign_share(before: Clock, after: Clock, own_cpu_s: float, cores: int) -> tuple[float, float]:
    """Shares of `cores` cores between two moments that went to processes other than those that used `own_cpu_s`, and to the hypervisor."""
    capacity = max(1e-9, (after.at - before.at) * cores)
    foreign = max(0.0, after.busy_s - before.busy_s - own_cpu_s) / capacity
    return round(foreign, 4), round((after.stolen_s - before.stolen_s) / capacity, 4)
