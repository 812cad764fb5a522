"""Lack of memory, in whatever words allocators and libraries say it."""

import torch

_WORDS = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")


def lacks_memory(error: Exception) -> bool:
    """Whether the device or the host had no memory: torch's own type, Python's, or a library's error that says so."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)
