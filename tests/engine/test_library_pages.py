"""Pages of libraries that go back to the system: which do, which must not, and that what is read again is what it was."""

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from engine.library_pages import _as_in_their_files, release_library_pages

PAGE = mmap.PAGESIZE
NUM_PAGES = 16

TORCH = """
import psutil, torch
from engine.library_pages import release_library_pages
x = torch.arange(4096, dtype=torch.float32).reshape(64, 64) / 4096
before = (x @ x.T).exp().sum().item()
shared = psutil.Process().memory_info().shared
released = release_library_pages()
left = psutil.Process().memory_info().shared
assert released > 0.5 * shared > 2 * left, (released, shared, left)
assert (x @ x.T).exp().sum().item() == before
print("well")
"""


def test_torch_computes_as_before_on_what_has_gone() -> None:
    assert subprocess.run([sys.executable, "-c", TORCH], check=True, capture_output=True, text=True).stdout == "well\n"


class Mapped:
    """A private mapping of a file whose pages are all ones, every page read."""

    def __init__(self, file: Path) -> None:
        file.write_bytes(b"\x01" * NUM_PAGES * PAGE)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        with file.open("rb") as opened:
            address = self._libc.mmap(
                None, NUM_PAGES * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, opened.fileno(), 0
            )
        assert address not in (None, ctypes.c_void_p(-1).value)
        self.start = int(address)
        assert self.read() == b"\x01" * NUM_PAGES

    def write(self, page: int) -> None:
        ctypes.memset(self.start + page * PAGE, 2, 1)

    def close_to_writing(self) -> None:
        assert self._libc.mprotect(ctypes.c_void_p(self.start), NUM_PAGES * PAGE, mmap.PROT_READ) == 0

    def read(self) -> bytes:
        """Each page's first byte."""
        return b"".join(ctypes.string_at(self.start + page * PAGE, 1) for page in range(NUM_PAGES))

    def resident(self) -> int:
        """Pages of it that are in this process's memory."""
        smaps = Path("/proc/self/smaps").read_text()
        lines = smaps[smaps.index(f"{self.start:x}-") :].splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("Rss:"))) * 1024 // PAGE

    def end(self) -> None:
        self._libc.munmap(ctypes.c_void_p(self.start), NUM_PAGES * PAGE)


@pytest.mark.parametrize(("name", "goes"), [("lib.so", True), ("lib.so.1.2", True), ("weights.safetensors", False)])
def test_a_library_that_nobody_writes_goes_and_comes_back(tmp_path: Path, name: str, goes: bool) -> None:
    mapped = Mapped(tmp_path / name)
    mapped.close_to_writing()
    assert mapped.resident() == NUM_PAGES
    assert release_library_pages() >= (NUM_PAGES * PAGE if goes else 0)
    assert mapped.resident() == (0 if goes else NUM_PAGES)
    assert mapped.read() == b"\x01" * NUM_PAGES
    mapped.end()


@pytest.mark.parametrize("closed", [True, False])
def test_what_was_written_stays(tmp_path: Path, closed: bool) -> None:
    mapped = Mapped(tmp_path / "lib.so")
    mapped.write(3)
    if closed:
        mapped.close_to_writing()
    release_library_pages()
    assert mapped.read() == b"\x01" * 3 + b"\x02" + b"\x01" * (NUM_PAGES - 4)
    mapped.end()


HEAD = "7f00-8f00 r-xp 00000000 fe:00 42                         /usr/lib/libx.so.1\n"
FIELDS = "Size:               4 kB\nRss:                4 kB\nAnonymous:          {0} kB\nSwap:               {1} kB\nVmFlags: rd ex\n"


@pytest.mark.parametrize(
    ("smaps", "given"),
    [
        (HEAD + FIELDS.format(0, 0), [(0x7F00, 0x8F00, 4096)]),
        (HEAD + FIELDS.format(4, 0), []),
        (HEAD + FIELDS.format(0, 4), []),
        (HEAD + "Rss:                4 kB\n", []),
        (HEAD.replace("r-xp", "r-xs") + FIELDS.format(0, 0), []),
        (HEAD.replace("r-xp", "rw-p") + FIELDS.format(0, 0), []),
        (HEAD.replace("/usr/lib/libx.so.1", "/usr/lib/libx.so.1 (deleted)") + FIELDS.format(0, 0), []),
        (HEAD.replace("/usr/lib/libx.so.1", "") + FIELDS.format(0, 0), []),
        ("", []),
    ],
)
def test_which_mappings_are_as_in_their_files(smaps: str, given: list[tuple[int, int, int]]) -> None:
    other = "a000-b000 rw-p 00000000 00:00 0                          [heap]\n" + FIELDS.format(4, 0)
    assert list(_as_in_their_files(other + smaps + other)) == given
