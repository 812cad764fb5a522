"""Memory by machine and by cgroup."""

from pathlib import Path

import pytest

from engine.host_memory import physical_bytes, usable_bytes

MACHINE = physical_bytes()


def _bytes(root: Path, membership: str, files: dict[str, str]) -> int:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    (root / "membership").write_text(membership)
    return usable_bytes(root, root / "membership")


@pytest.mark.parametrize(
    ("content", "usable"), [("4096000\n", 4096000), ("max\n", MACHINE), ("", MACHINE), (f"{MACHINE + 4096}\n", MACHINE)]
)
def test_a_limit_of_the_unified_hierarchy_counts_where_it_is_below_the_machines_memory(
    tmp_path: Path, content: str, usable: int
) -> None:
    assert _bytes(tmp_path, "0::/\n", {"memory.max": content}) == usable


@pytest.mark.parametrize(("content", "usable"), [("4096000\n", 4096000), ("9223372036854771712\n", MACHINE)])
def test_a_limit_of_the_memory_controller_counts(tmp_path: Path, content: str, usable: int) -> None:
    """Version 1, whose number for no limit is beyond any machine."""
    files = {"memory/service/memory.limit_in_bytes": content}
    assert _bytes(tmp_path, "4:memory:/service\n3:cpu,cpuacct:/other\n", files) == usable


@pytest.mark.parametrize("file", ["pod/memory.max", "pod/engine/memory.max"])
def test_a_group_above_limits_its_groups_and_one_beside_it_does_not(tmp_path: Path, file: str) -> None:
    files = {"memory.max": "max", file: "8192000", "beside/memory.max": "4096"}
    assert _bytes(tmp_path, "0::/pod/engine\n", files) == 8192000


def test_without_cgroups_the_machines_memory_counts(tmp_path: Path) -> None:
    assert usable_bytes(tmp_path / "missing", tmp_path / "none") == MACHINE
