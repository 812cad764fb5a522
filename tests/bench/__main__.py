"""`make bench`: each benchmark in a process of its own, one after another; one JSON document on standard output."""

import json
import os
import subprocess
import sys

from engine.openmp import prefer_short_spin
from tests.servers.tied import tie

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
        command = [sys.executable, "-m", f"tests.bench.{name}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ) as benchmark:
            tie(benchmark.pid)
            said, _ = benchmark.communicate()
        if benchmark.returncode != 0:
            print(f"error: {name} ended with {benchmark.returncode}", file=sys.stderr)
            return 1
        reports[name] = json.loads(said)
    json.dump(reports, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
