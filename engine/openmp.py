"""How OpenMP's threads wait for each other, settled before torch loads the library. Standard library only.

GNU OpenMP spins some milliseconds at a barrier before it sleeps. Where anything else wants a core (the service beside its engine,
a broker, a test run) the thread that is waited for is the one that does not run, and each of a step's hundreds of barriers costs
a time slice. Median tokens/s of decodes of SmolLM2-135M in bfloat16 (C++ operators with AVX2, two cores of an AMD EPYC, three turns of
1.1 s each, 25 November 2026) by rounds of spin, at batch 1 and 8, alone and beside one process that never sleeps:

    rounds   alone 1   8     beside 1   8
       300      53    210       40    177
     1,000      47    243       30    147
     3,000      64    288       33    140
    10,000      68    319       31    134 (and once 39)

3,000 has most of what a longer wait gives on a machine of one's own, and does not collapse on a shared one, as the library's own
setting did (0.7 at batch 1 beside one process, on plain torch). An idle engine sleeps whatever is set.
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
