"""Compiles every kernel and tuning row for GPUs that need not be here, and prints registers, spills and shared memory.

`python -m tests.bench.compile_report [architecture ...]`; exits 1 when something does not compile, spills, or exceeds
what a program of the architecture may use.
"""

import sys
import time

from kernels.triton.tuning import SHARED_MEMORY_BYTES
from tests.kernels.compile_matrix import ARCHITECTURES, cases, compile_case


def main(architectures: list[str]) -> int:
    unknown = [name for name in architectures if name not in SHARED_MEMORY_BYTES]
    if unknown:
        print(f"unknown architecture {unknown[0]}; there are {', '.join(SHARED_MEMORY_BYTES)}", file=sys.stderr)
        return 2
    started = time.monotonic()
    failures = count = 0
    print(f"{'architecture':<13}{'kernel':<68}{'registers':>10}{'stack B':>9}{'shared KiB':>12}{'limit':>7}")
    for architecture in architectures or ARCHITECTURES:
        limit = SHARED_MEMORY_BYTES[architecture]
        for case in cases(architecture):
            found = compile_case(case, architecture)
            count += 1
            good = found.stack_bytes == 0 and found.shared_bytes <= limit
            failures += not good
            shared = f"{found.shared_bytes / 1024:.1f}"
            line = f"{architecture:<13}{case.name:<68}{found.registers:>10}{found.stack_bytes:>9}{shared:>12}{limit >> 10:>7}"
            print(line if good else line + "  <-- fails", flush=True)
    print(f"{count} compiled, {failures} failing, {time.monotonic() - started:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
