"""`make bench`: each benchmark in a process of its own, one after another; one JSON document on standard output, of those that ran.

Exits 1 when one of them did not, 130 at Ctrl-C, with those that had.
"""

import json
import os
import subprocess
import sys
from typing import Any

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


def report_in(said: str) -> dict[str, Any]:
    """The report in a benchmark's standard output, where a library may print too. Raises ValueError without one."""
    lines = said.splitlines()
    if "{" not in lines or "}" not in lines:
        raise ValueError(f"no JSON object between lines of their own in {said[:200]!r}")
    # Printed with indentation: no other line of it is a brace alone at its beginning.
    first, last = lines.index("{"), len(lines) - lines[::-1].index("}")
    found: dict[str, Any] = json.loads("\n".join(lines[first:last]))
    return found


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
        try:
            reports[name] = report_in(said.decode("utf-8", "replace"))
        except ValueError as error:
            print(f"error: {name} printed no report: {error}", file=sys.stderr)
            code = 1
    json.dump(reports, sys.stdout, indent=1)
    print()
    return code


if __name__ == "__main__":
    sys.exit(main())
