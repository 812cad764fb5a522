"""`make bench-peers`: Sluice and its peers in interleaved blocks, as one JSON document.

    python -m tests.bench.peers [--model NAME] [--systems a,b] [--cases "decode 8/32,prefill 512"] [--first-block 0] [--blocks 3]
                                [--merge FILE ...]

All systems hold the model at once: where memory is short, name fewer of them.
Further runs (other cases, other blocks) of the same commit, machine and model merge into one document: --merge reads them and prints the
whole. On a machine that others use, --quiet-with COMMAND runs each turn while `COMMAND cat` runs, and --favour (root) puts the
system whose turn it is before all other processes. --busy N measures beside N processes that never sleep.
"""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from tests.bench import report
from tests.bench.peers import blocks, machine, summary
from tests.bench.peers.cases import CASES
from tests.bench.peers.catalogue import CATALOGUE, default_systems
from tests.bench.peers.models import DEMO, known_models, weights_of


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = default_systems(machine.description()["instruction_sets"])
    parser.add_argument(
        "--model",
        default=DEMO,
        choices=known_models(),
        help="%(default)s has trained weights; the others are of these models' shapes, with random ones",
    )
    parser.add_argument(
        "--systems", default=",".join(defaults), help=f"of {', '.join(CATALOGUE)}; by this processor %(default)s"
    )
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--first-block", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: the cores that this process may use")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet-with", default="", metavar="COMMAND")
    parser.add_argument("--favour", action="store_true")
    parser.add_argument("--busy", type=int, default=0, metavar="N")
    parser.add_argument("--merge", nargs="*", default=[], type=Path, metavar="FILE")
    parser.add_argument("--merge-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    for given, known in ((arguments.systems, CATALOGUE), (arguments.cases, CASES)):
        if unknown := [name for name in given.split(",") if name not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; there is: {', '.join(known)}")
    return arguments


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run."""
    where = machine.description()
    threads = arguments.threads or where["cores"]
    indices = range(arguments.first_block, arguments.first_block + arguments.blocks)
    with blocks.Bench(
        arguments.systems.split(","),
        model=arguments.model,
        threads=threads,
        seed=arguments.seed,
        quiet_with=arguments.quiet_with,
        favour=arguments.favour,
        busy=arguments.busy,
    ) as bench:
        measured = blocks.run(bench, arguments.cases.split(","), indices)
        systems = bench.systems
        probe = bench.probe_facts
    return {
        "environment": report.environment() | where | {"probe": probe},
        "parameters": {
            "model": arguments.model,
            "weights": weights_of(arguments.model),
            "threads": threads,
            "seed": arguments.seed,
            "favoured": arguments.favour,
            "held": bool(arguments.quiet_with),
            "busy_processes": arguments.busy,
            "max_foreign_share": blocks.MAX_FOREIGN,
            "max_stolen_share": blocks.MAX_STOLEN,
        },
        "systems": systems,
        "blocks": measured,
    }


def main() -> int:
    arguments = parse()
    # The systems, which lead sessions of their own, are ended too, and what was measured is printed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    runs = [run for file in arguments.merge for run in json.loads(file.read_text("utf-8"))["runs"]]
    try:
        if not arguments.merge_only:
            runs.append(measure(arguments))
        document = summary.document(runs)
    except (summary.MergeError, blocks.HoldError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report.print_report(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
