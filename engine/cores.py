"""How many cores this process may use. Standard library only: asked before torch loads OpenMP, whose pinning narrows the affinity."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Cores by affinity, fewer where a cgroup (v1 or v2, the process's own or one above it) grants less CPU time; at least 1."""
    cores = len(os.sched_getaffinity(0))
    quotas = [_quota_v2(group) for group in _groups(cgroups, membership, "")]
    quotas += [_quota_v1(group) for group in _groups(cgroups / "cpu", membership, "cpu")]
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas if quota is not None)]))


def _groups(mount: Path, membership: Path, controller: str) -> Iterator[Path]:
    """The mount and every directory below it down to the process's own group. `controller` "" is v2's single hierarchy."""
    yield mount
    for line in _read(membership).splitlines():
        _, _, named = line.partition(":")
        controllers, _, path = named.partition(":")
        if controller in controllers.split(","):
            below = mount
            for part in Path(path).parts[1:]:
                below = below / part
                yield below


def _quota_v2(group: Path) -> float | None:
    quota, _, period = _read(group / "cpu.max").strip().partition(" ")
    return _ratio(quota, period)


def _quota_v1(group: Path) -> float | None:
    return _ratio(_read(group / "cpu.cfs_quota_us").strip(), _read(group / "cpu.cfs_period_us").strip())


def _ratio(quota: str, period: str) -> float | None:
    """None: no limit ("max", -1, or no such file)."""
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(quota) and int(period) else None


def _read(file: Path) -> str:
    return file.read_text("utf-8") if file.is_file() else ""
