"""How OpenMP's threads wait for each other, settled before torch loads the library. Standard library only.

GNU OpenMP spins some milliseconds at a barrier before it sleeps. Where anything else wants a core (the service beside its engine,
a broker, a test run) the thread that is waited for is the one that does not run, and each of a step's hundreds of barriers costs
a time slice. Decode at batch 1 on two cores, idle and beside one busy process: 28 and 0.7 tokens/s as it comes, 28 and 5 with a
spin of 30,000 rounds, 24 and 14 with 3,000, 20 and 18 with 1,000.
"""

import os

SPIN_COUNT = "3000"


def prefer_short_spin() -> None:
    """Sets GOMP_SPINCOUNT for this process unless the user has said how to wait. Has no effect once torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def pin_threads() -> None:
    """One compute thread a core, each staying on its own, unless the user has placed them. Has no effect once torch is imported."""
    places = ",".join(f"{{{core}}}" for core in sorted(os.sched_getaffinity(0)))
    os.environ.setdefault("OMP_PLACES", places)
    os.environ.setdefault("OMP_PROC_BIND", "close")
