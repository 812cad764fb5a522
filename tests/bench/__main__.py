"""`make bench`: each benchmark in a process of its own, one after another; one JSON document on standard output."""

import json
import os
import subprocess
import sys

from engine.openmp import prefer_short_spin

BENCHMARKS = (
    "decode",
    "step",
    "mixed",
    "prefix",
    "waste",
    "scheduler",
    "startup",
    "service",
    "service_load",
    "service_overhead",
    "operators",
    "quality",
)


def main() -> int:
    prefer_short_spin()
    reports = {}
    for name in sys.argv[1:] or BENCHMARKS:
        print(f"{name} …", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, "-m", f"tests.bench.{name}"], stdout=subprocess.PIPE, env=os.environ, check=False
        )
        if done.returncode != 0:
            print(f"error: {name} ended with {done.returncode}", file=sys.stderr)
            return 1
        reports[name] = json.loads(done.stdout)
    json.dump(reports, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
