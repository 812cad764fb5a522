"""Cores by affinity and by cgroup."""

import os
from pathlib import Path

import pytest

from engine.cores import usable_cores

AFFINITY = len(os.sched_getaffinity(0))


def _cores(root: Path, membership: str, files: dict[str, str]) -> int:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    (root / "membership").write_text(membership)
    return usable_cores(root, root / "membership")


@pytest.mark.parametrize(
    ("content", "most"),
    [("100000 100000\n", 1), ("50000 100000\n", 1), ("150000 100000\n", 2), ("max 100000\n", 10**6), ("", 10**6)],
)
def test_a_quota_of_the_unified_hierarchy_limits_the_cores(tmp_path: Path, content: str, most: int) -> None:
    """Rounded up, never above the affinity; `max` and an unreadable quota limit nothing."""
    assert _cores(tmp_path, "0::/\n", {"cpu.max": content}) == min(most, AFFINITY)


@pytest.mark.parametrize(("quota", "most"), [("100000", 1), ("150000", 2), ("-1", 10**6)])
def test_a_quota_of_the_cpu_controller_limits_the_cores(tmp_path: Path, quota: str, most: int) -> None:
    """Version 1: microseconds of quota and period in files of their own."""
    files = {"cpu/cpu.cfs_quota_us": f"{quota}\n", "cpu/cpu.cfs_period_us": "100000\n"}
    assert _cores(tmp_path, "4:cpu,cpuacct:/\n", files) == min(most, AFFINITY)


@pytest.mark.parametrize(
    ("membership", "file"),
    [
        ("0::/pod/engine\n", "pod/cpu.max"),
        ("0::/pod/engine\n", "pod/engine/cpu.max"),
    ],
)
def test_a_group_above_limits_its_groups(tmp_path: Path, membership: str, file: str) -> None:
    """The tightest of the process's own group and those above it counts; a group beside it does not."""
    files = {"cpu.max": "max 100000", file: "100000 100000", "beside/cpu.max": "1000 100000"}
    assert _cores(tmp_path, membership, files) == 1


def test_no_cgroup_file_limits_nothing(tmp_path: Path) -> None:
    """Affinity alone counts."""
    assert usable_cores(tmp_path / "missing", tmp_path / "none") == AFFINITY
