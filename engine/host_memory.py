"""How much memory this process may use, however much of it is taken now. Standard library only."""

import os
from pathlib import Path

from engine.cgroups import MEMBERSHIP, MOUNT, groups, read


def usable_bytes(cgroups: Path = MOUNT, membership: Path = MEMBERSHIP) -> int:
    """The machine's memory, less where a cgroup (v1 or v2, the process's own or one above it) is held to less. Swap is not counted."""
    limits = [read(group / "memory.max") for group in groups(cgroups, membership, "")]
    limits += [read(group / "memory.limit_in_bytes") for group in groups(cgroups / "memory", membership, "memory")]
    # No limit is "max" in v2, a number that no machine has in v1, and no file at the root of either.
    return min([physical_bytes(), *(int(limit) for limit in limits if limit.isdigit())])


def physical_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
