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
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from service.errors import SetupError
from tests.bench import report
from tests.bench.peers import blocks, machine, summary
from tests.bench.peers.build import in_one_line
from tests.bench.peers.cases import CASES
from tests.bench.peers.catalogue import CATALOGUE, default_systems
from tests.bench.peers.models import DEMO, ensure_model, known_models, weights_of
from tests.bench.peers.process import SystemFailed


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
    parser.add_argument("--first-block", type=report.at_least(0), default=0)
    parser.add_argument("--blocks", type=report.at_least(1), default=3)
    parser.add_argument("--threads", type=report.at_least(0), default=0, help="0: the cores that this process may use")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet-with", default="", metavar="COMMAND")
    parser.add_argument("--favour", action="store_true")
    parser.add_argument("--busy", type=report.at_least(0), default=0, metavar="N")
    parser.add_argument("--merge", nargs="*", default=[], type=Path, metavar="FILE")
    parser.add_argument("--merge-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    for given, known in ((arguments.systems, CATALOGUE), (arguments.cases, CASES)):
        if unknown := [name for name in given.split(",") if name not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; there is: {', '.join(known)}")
    return arguments


def header(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a run says before anything is measured: all that decides whether it merges with others."""
    where = machine.description()
    return {
        "environment": report.environment() | where,
        "parameters": {
            "model": arguments.model,
            "weights": weights_of(arguments.model),
            "threads": arguments.threads or where["cores"],
            "seed": arguments.seed,
            "favoured": arguments.favour,
            "held": bool(arguments.quiet_with),
            "busy_processes": arguments.busy,
            "max_foreign_share": blocks.MAX_FOREIGN,
            "max_stolen_share": blocks.MAX_STOLEN,
            "cases": {name: asdict(CASES[name]) for name in arguments.cases.split(",")},
        },
    }


def measure(arguments: argparse.Namespace, run: dict[str, Any]) -> Exception | None:
    """Completes the `run` of which `header` is the beginning; gives what ended it early. Raises `SystemFailed` for a dead probe."""
    indices = range(arguments.first_block, arguments.first_block + arguments.blocks)
    run["blocks"] = []
    try:
        with blocks.Bench(
            arguments.systems.split(","),
            model=arguments.model,
            threads=run["parameters"]["threads"],
            seed=arguments.seed,
            quiet_with=arguments.quiet_with,
            favour=arguments.favour,
            busy=arguments.busy,
        ) as bench:
            run["systems"] = bench.systems
            run["environment"]["probe"] = bench.probe_facts
            ended = blocks.run(bench, arguments.cases.split(","), indices, run["blocks"])
    except Exception as error:
        if not run["blocks"]:
            raise
        ended = error  # of ending the systems, when everything is measured
    if ended is not None:
        run["ended_early"] = in_one_line(ended) or type(ended).__name__
    return ended


def main() -> int:
    arguments = parse()
    # The systems, which lead sessions of their own, are ended too, and what was measured is printed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    runs = [run for file in arguments.merge for run in json.loads(file.read_text("utf-8"))["runs"]]
    ended: Exception | None = None
    try:
        if arguments.merge_only:
            report.print_report(summary.document(runs))
            return 0
        run = header(arguments)
        summary.check([*runs, run])
        ensure_model(arguments.model)
        ended = measure(arguments, run)
    except (summary.MergeError, SystemFailed, SetupError) as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, SetupError) else 2
    runs.append(run)
    try:
        document = summary.document(runs)
    except Exception as error:  # noqa: BLE001 - what was measured is told, whatever is wrong with what is made of it
        traceback.print_exc()
        document, ended = {"benchmark": "peers", "runs": runs}, ended or error
    report.print_report(document)
    if ended is None:
        return 0
    print(f"error: {in_one_line(ended) or type(ended).__name__}; what was whole by then is told", file=sys.stderr)
    return 2 if isinstance(ended, blocks.HoldError) else 1


if __name__ == "__main__":
    sys.exit(main())
