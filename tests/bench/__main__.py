"""`make bench`: each benchmark in a process of its own, one after another; one JSON document on standard output, of those that ran.

Exits 1 when one of them did not, 130 at Ctrl-C, with those that had.
"""

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
    reports, code = {}, 0
    for name in sys.argv[1:] or BENCHMARKS:
        print(f"{name} …", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", f"tests.bench.{name}"]
        try:
            with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ) as benchmark:
                tie(benchmark.pid)
                said, _ = benchmark.communicate()
        except KeyboardInterrupt:
            # It heard it, too. What is over is not lost.
            code = 130
            break
        if benchmark.returncode != 0:
            print(f"error: {name} ended with {benchmark.returncode}", file=sys.stderr)
            code = 1
            continue
        reports[name] = json.loads(said)
    json.dump(reports, sys.stdout, indent=1)
    print()
    return code


if __name__ == "__main__":
    sys.exit(main())
