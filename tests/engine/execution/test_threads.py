"""Cores by affinity and by cgroup."""

import os
from pathlib import Path

import pytest

from engine.execution.threads import usable_cores


@pytest.mark.parametrize(
    ("content", "most"), [("100000 100000\n", 1), ("150000 100000\n", 2), ("max 100000\n", 10**6), ("", 10**6)]
)
def test_a_cgroup_quota_limits_the_cores(tmp_path: Path, content: str, most: int) -> None:
    """Rounded up, never above the affinity; `max` and an unreadable quota limit nothing."""
    quota = tmp_path / "cpu.max"
    quota.write_text(content)
    assert usable_cores(quota) == min(most, len(os.sched_getaffinity(0)))


def test_no_cgroup_file_limits_nothing(tmp_path: Path) -> None:
    """Affinity alone counts."""
    assert usable_cores(tmp_path / "missing") == len(os.sched_getaffinity(0))
