"""How many cores this process may use, and the one place that tells torch."""

import math
import os
from pathlib import Path

import torch

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores(quota_file: Path = _CGROUP_QUOTA) -> int:
    """Cores by affinity, fewer where a cgroup (v2) grants less CPU time; at least 1."""
    cores = len(os.sched_getaffinity(0))
    if quota_file.is_file():
        quota, _, period = quota_file.read_text().strip().partition(" ")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def set_compute_threads(wanted: int) -> int:
    """Sets torch's compute threads to `wanted`, 0 = `usable_cores()`; returns the number set."""
    threads = wanted or usable_cores()
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return threads
