"""`make chaos`: seeded runs against real brokers, one JSON summary on standard output.

    python -m tests.chaos [--seed N] [--runs N] [--prompts N] [--duration S] [--replica-kills N] … [--at-least-once]
    python -m tests.chaos --replay DIR/replay.json          the same plan again
    python -m tests.chaos --check DIR/history.jsonl.gz      judge a saved history again, without any broker

Each run leaves its replay file, history and logs below --out. Exit status 1 when a rule was broken.
"""

import argparse
import asyncio
import json
import sys
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvloop

from tests.bench.report import environment
from tests.chaos.checker import check
from tests.chaos.history import History
from tests.chaos.plan import Plan, Shape, draw_plan
from tests.chaos.run import Outcome, emptied, run
from tests.chaos.scene import stage
from tests.servers.kafka import LOGS, VERSION


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=1, help="seeds one after another, from --seed on")
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--check", type=Path)
    parser.add_argument("--out", type=Path, default=LOGS / "chaos")
    parser.add_argument("--at-least-once", action="store_true", help="tolerate what at-least-once delivery may do")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=JSON", help="a setting of the replicas")
    parser.add_argument(
        "--settle", type=float, default=120.0, help="seconds without any new result that end the wait for the rest"
    )
    for one in fields(Shape):
        name = "--" + one.name.removesuffix("_s").replace("_", "-")
        if one.type is bool or one.type == "bool":
            parser.add_argument(name, dest=one.name, action=argparse.BooleanOptionalAction, default=one.default)
        else:
            parser.add_argument(name, dest=one.name, type=type(one.default), default=one.default)
    return parser.parse_args(arguments)


def summary(outcome: Outcome) -> dict[str, Any]:
    """One run, for the report."""
    return {
        "seed": outcome.plan.seed,
        "shape": asdict(outcome.plan.shape),
        "ok": outcome.ok,
        "at_rest": outcome.at_rest,
        "verdict": outcome.verdict.report(),
        "faults": outcome.faults,
        "seconds": outcome.seconds,
    }


async def runs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run's summary."""
    shape = Shape(**{one.name: getattr(options, one.name) for one in fields(Shape)})
    plans = [draw_plan(options.seed + index, shape) for index in range(options.runs)]
    if options.replay:
        plans = [Plan.load(options.replay)]
    overrides = {name: json.loads(value) for name, _, value in (one.partition("=") for one in options.set)}
    found = []
    for plan in plans:
        async with stage(plan.shape.brokers) as on:
            print(f"seed {plan.seed}: {plan.shape.prompts} prompts, {len(plan.faults)} faults …", file=sys.stderr, flush=True)
            directory = options.out / f"seed-{plan.seed}"
            await asyncio.to_thread(emptied, directory)
            plan.save(directory / "replay.json")
            outcome = await run(
                on,
                plan,
                directory,
                at_least_once=options.at_least_once,
                overrides=overrides,
                settle_s=options.settle,
            )
            print(
                f"seed {plan.seed}: {'clean' if outcome.ok else 'NOT CLEAN'} {outcome.verdict.counts}",
                file=sys.stderr,
                flush=True,
            )
            found.append(summary(outcome))
    return found


def main() -> int:
    options = parse(sys.argv[1:])
    if options.check:
        verdict = check(History.load(options.check), at_least_once=options.at_least_once)
        print(json.dumps(verdict.report(), indent=1))
        return 0 if verdict.ok else 1
    began = environment()
    found = uvloop.run(runs(options))
    report = {
        "suite": "chaos",
        "ok": all(one["ok"] for one in found),
        "at_least_once": options.at_least_once,
        "runs": found,
        "kafka": VERSION,
        "confluent_kafka": version("confluent-kafka"),
        "environment": began,
    }
    print(json.dumps(report, indent=1))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
