"""Gives back the pages of libraries that only their loading has read. Standard library only.

torch's usual build links CUDA's libraries. Where no GPU computes, their constructors run once through hundreds of MiB of code and
constants that are never read again, yet stay in the process's memory until the system runs short of it.
"""

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

_SMAPS = Path("/proc/self/smaps")
_MAPPING = re.compile(r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) r-[-x]p \S+ \S+ \S+ +\S.*\.so(\.[0-9.]+)?$")
_MADV_DONTNEED = 4


def release_library_pages() -> int:
    """Bytes of shared libraries that were resident until now; what of them is read again comes back from the page cache or the file.

    0 where the system does not say what is resident (Linux does, unless a sandbox forbids it). Other threads may run, but none may load
    or unload a library meanwhile.
    """
    try:
        smaps = _SMAPS.read_text("utf-8", "replace")
    except OSError:
        return 0
    libc = ctypes.CDLL(None)
    released = 0
    for start, end, resident in _as_in_their_files(smaps):
        if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED) == 0:
            released += resident
    return released


def _as_in_their_files(smaps: str) -> Iterator[tuple[int, int, int]]:
    """(start, end, resident bytes) of the libraries' mappings that none may write and in which no page differs from the file.

    One that was written before it was closed to writing (relocated constants) has pages of its own, in memory or in swap: to drop
    those would lose them.
    """
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps):
        head, _, lines = block.partition("\n")
        mapping = _MAPPING.match(head)
        if mapping is None:
            continue
        fields = {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+): +(\d+) kB$", lines, re.MULTILINE)}
        if fields.get("Anonymous") == 0 and fields.get("Swap") == 0:
            yield int(mapping["start"], 16), int(mapping["end"], 16), fields.get("Rss", 0)
