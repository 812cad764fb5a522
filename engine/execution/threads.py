"""The one place that tells torch how many threads compute."""

import torch

from engine.cores import usable_cores


def set_compute_threads(wanted: int) -> int:
    """Sets torch's compute threads to `wanted`, 0 = `usable_cores()`; returns the number set. The C++ operators take as many."""
    threads = wanted or usable_cores()
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return threads
