"""`make mutants`: each planted fault of the commit protocol in a short run of its own; the checker has to catch each, the control none.

    python -m tests.chaos.hunt [NAME …] [--seed N]

One broker serves all runs; each has topics and a group of its own. JSON on standard output; exit status 1 when a mutant survived or the
control was not clean.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import uvloop

from tests.bench.report import environment
from tests.chaos.mutants import MUTANTS, Mutant
from tests.chaos.plan import Fault, Plan, Shape
from tests.chaos.run import emptied, run
from tests.chaos.scene import Stage, stage
from tests.servers.kafka import LOGS

SHAPE = Shape(
    prompts=110, duration_s=10.0, replicas=2, brokers=1, partitions=3, min_tokens=24, max_tokens=64, tokens_per_s=50.0, bad_prompts=3
)  # fmt: skip
SETTLE_S = 12.0
CONTROL = "control"


def plan_of(seed: int, faults: tuple[Fault, ...]) -> Plan:
    return Plan(seed=seed, shape=SHAPE, faults=tuple(sorted(faults, key=lambda fault: fault.at_s)))


async def one(on: Stage, name: str, seed: int, out: Path) -> dict[str, Any]:
    """One mutant's run, or the control's, which has every fault of every mutant's kind."""
    mutant = MUTANTS.get(name)
    directory = out / name
    await asyncio.to_thread(emptied, directory)
    plan = plan_of(seed, mutant.faults if mutant else _all_faults())
    plan.save(directory / "replay.json")
    settle_s = SETTLE_S if mutant else 60.0
    outcome = await run(on, plan, directory, mutant=name if mutant else "", prefix=f"{name}.", settle_s=settle_s)
    fired = {rule: count for rule, count in outcome.verdict.counts.items() if count}
    return {
        "what": mutant.what if mutant else "nothing planted",
        "passed": _caught(mutant, fired) if mutant else outcome.ok,
        "broken_rules": fired,
        "examples": outcome.verdict.report()["examples"][:3],
        "crashes": outcome.faults["crashes"],
        "seconds": sum(outcome.seconds.values()),
    }


def _caught(mutant: Mutant, fired: dict[str, int]) -> bool:
    return bool(set(mutant.breaks) & set(fired))


def _all_faults() -> tuple[Fault, ...]:
    return tuple(dict.fromkeys(fault for mutant in MUTANTS.values() for fault in mutant.faults))


async def hunt(names: list[str], seed: int, out: Path) -> dict[str, Any]:
    """Every run, one after another."""
    found: dict[str, Any] = {}
    async with stage(1, tag="mutants") as on:
        for name in names:
            found[name] = await one(on, name, seed, out)
            verdict = "clean" if name == CONTROL else "caught"
            said = verdict if found[name]["passed"] else f"NOT {verdict.upper()}"
            print(
                f"{name}: {said} {found[name]['broken_rules']} in {found[name]['seconds']:.0f} s", file=sys.stderr, flush=True
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*MUTANTS, CONTROL, []], metavar="NAME")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=LOGS / "mutants")
    options = parser.parse_args()
    began = environment()
    found = uvloop.run(hunt(options.names or [CONTROL, *MUTANTS], options.seed, options.out))
    caught = sum(one["passed"] for name, one in found.items() if name != CONTROL)
    report = {
        "suite": "mutants",
        "ok": all(one["passed"] for one in found.values()),
        "caught": f"{caught} of {len(found.keys() - {CONTROL})}",
        "runs": found,
        "environment": began,
    }
    print(json.dumps(report, indent=1))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
