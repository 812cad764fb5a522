"""The control groups (v1 and v2) that this process stands in. Standard library only; without cgroups there are no limits to read."""

from collections.abc import Iterator
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def groups(mount: Path, membership: Path, controller: str) -> Iterator[Path]:
    """The mount and every directory below it down to the process's own group. `controller` "" is v2's single hierarchy."""
    yield mount
    for line in read(membership).splitlines():
        _, _, named = line.partition(":")
        controllers, _, path = named.partition(":")
        if controller in controllers.split(","):
            below = mount
            for part in Path(path).parts[1:]:
                below = below / part
                yield below


def read(file: Path) -> str:
    """The file's text without the space around it; "" where there is no such file."""
    return file.read_text("utf-8").strip() if file.is_file() else ""
