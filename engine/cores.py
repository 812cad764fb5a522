"""How many cores this process may use. Standard library only: asked before torch loads OpenMP, whose pinning narrows the affinity."""

import math
import os
from pathlib import Path

from engine.cgroups import MEMBERSHIP, MOUNT, groups, read


def usable_cores(cgroups: Path = MOUNT, membership: Path = MEMBERSHIP) -> int:
    """Cores by affinity, fewer where a cgroup (v1 or v2, the process's own or one above it) grants less CPU time; at least 1."""
    cores = len(os.sched_getaffinity(0))
    quotas = [_quota_v2(group) for group in groups(cgroups, membership, "")]
    quotas += [_quota_v1(group) for group in groups(cgroups / "cpu", membership, "cpu")]
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas if quota is not None)]))


def _quota_v2(group: Path) -> float | None:
    quota, _, period = read(group / "cpu.max").partition(" ")
    return _ratio(quota, period)


def _quota_v1(group: Path) -> float | None:
    return _ratio(read(group / "cpu.cfs_quota_us"), read(group / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    """None: no limit ("max", -1, or no such file)."""
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(quota) and int(period) else None
