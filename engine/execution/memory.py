"""Lack of memory, in whatever words allocators and libraries say it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.errors import OutOfMemoryError

_WORDS = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")


def lacks_memory(error: Exception) -> bool:
    """Whether the device or the host had no memory: torch's own type, Python's, or a library's error that says so."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


@contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """Gives the device's and the host allocator's lack of memory the engine's own type, `OutOfMemoryError`, with this message."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise OutOfMemoryError(message) from error
