"""How compute threads wait for each other, settled before torch loads OpenMP. Standard library only.

GNU OpenMP spins some milliseconds at a barrier before it sleeps. Where anything else wants a core (the service beside its engine,
a broker, a test run) the thread that is waited for is the one that does not run, and each of a step's hundreds of barriers costs
a time slice. The C++ operators have threads of their own, which take each other's work (kernels/cpu/thread_pool.h) and wait as many
rounds as OpenMP's are told to; plain torch has OpenMP's. Median ms a step of SmolLM2-135M in bfloat16 (AVX2, two cores of an AMD EPYC,
five turns, 26 November 2026) by rounds of spin, at batch 1 and 8, alone and beside one process that never sleeps:

    rounds   alone 1    8     beside 1    8     OpenMP instead, beside 1    8
       300      13.8  16.5        22.8  23.7
     1,000      14.0  19.6        21.1  25.5
     3,000      12.1  16.8        21.7  26.2                        44.2   67.4
    10,000      13.8  16.5        21.8  26.4                        83.0  119.5

An idle engine sleeps whatever is set: the operators' threads after 100,000 rounds at the most. Where torch has begun threads of OpenMP's,
too, OMP_WAIT_POLICY=active lets those spin on the same cores.
"""

import os
from collections.abc import MutableMapping

SPIN_COUNT = "3000"


def prefer_short_spin(environment: MutableMapping[str, str] | None = None) -> None:
    """Sets GOMP_SPINCOUNT unless the user has said how to wait: for this process, which it does not reach once torch is imported, or in
    another's environment."""
    environment = os.environ if environment is None else environment
    if not environment.get("OMP_WAIT_POLICY") and not environment.get("GOMP_SPINCOUNT"):
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT


def pin_threads() -> None:
    """One compute thread a core, each staying on its own, unless the user has placed them. Has no effect once torch is imported."""
    places = ",".join(f"{{{core}}}" for core in sorted(os.sched_getaffinity(0)))
    os.environ.setdefault("OMP_PLACES", places)
    os.environ.setdefault("OMP_PROC_BIND", "close")
