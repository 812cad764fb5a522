"""`make bench-report`: result documents as one Markdown page with its picture.

    python -m tests.bench.published --out DIRECTORY/NAME FILE ...

Takes any documents of `make bench` and `make bench-peers`; writes NAME.md and, where peers were measured, NAME.png. What is not in
them is said to be missing.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.bench.peers.summary import model_of
from tests.bench.peers.targets import outcomes
from tests.bench.report import shown
from tests.bench.services import service_rows

Json = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path, help="without the suffix")
    arguments = parser.parse_args()
    documents = [json.loads(file.read_text("utf-8")) for file in arguments.files]
    peers = next((one for one in documents if one.get("benchmark") == "peers"), None)
    rest = [report for one in documents if one.get("benchmark") != "peers" for report in one.values()]
    suite: Json = {report["benchmark"]: report for report in rest if isinstance(report, dict) and "benchmark" in report}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    name = arguments.out.name.removesuffix(".md")
    picture = arguments.out.with_name(f"{name}.png")  # a name may hold a dot
    if peers and _has_rates(peers):
        from tests.bench.bars import draw

        draw(peers["summary"], model_of(peers["runs"][0]), picture)
    arguments.out.with_name(f"{name}.md").write_text(page(peers, suite, picture.name), encoding="utf-8")
    return 0


def page(peers: Json | None, suite: Json, picture: str) -> str:
    """The whole page."""
    parts = ["# Benchmark report", _machine(peers, suite)]
    if peers:
        summary = peers["summary"]
        parts += [
            f"![Tokens a second against peers and the machine's limit]({picture})" if _has_rates(peers) else "",
            "## Targets",
            _targets(summary),
            "## Tokens a second",
            "Medians of undisturbed turns, range in brackets; n of m: turns counted.",
            _rates(summary) if summary["cases"] else "No block was measured whole.",
            "## First tokens as Sluice's",
            "Share of the prompts whose first token is the one that Sluice's 16-bit engine gives, mean of the turns that count. "
            "Prompts are random tokens, after which the best two are often close: what rounds otherwise makes them change places, weights "
            "of 8 and 4 bits more than 16-bit ones. Of text, `make bench` has the quality.",
            _firsts(summary),
            "## Machine, beside the blocks",
            _probe(summary),
            "## Systems",
            _systems(peers),
        ]
    else:
        parts.append("Peers: not measured in these documents.")
    parts += ["## Service, start-up, memory", service_rows(suite)]
    if "operators" in suite:
        parts += ["## Operators against the limit", _kernels(suite["operators"])]
    parts += [_others(suite)] if suite else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _has_rates(peers: Json) -> bool:
    return any("tokens_per_s" in said for case in peers["summary"]["cases"].values() for said in case["systems"].values())


def _machine(peers: Json | None, suite: Json) -> str:
    found = [run["environment"] for run in peers["runs"]] if peers else []
    found += [report["environment"] for report in suite.values()]
    if not found:
        return ""
    first = found[0]
    sets = ", ".join(first.get("instruction_sets", [])) or "not recorded"
    commits = ", ".join(dict.fromkeys(one["commit"][:9] + (" (modified)" if one["modified"] else "") for one in found))
    lines = [
        f"{first['cpu']}, {first['cores']} cores, {first['memory_gib']} GiB; instruction sets: {sets}.",
        f"Commit {commits}; {first['time']}; torch {first['versions']['torch']}.",
    ]
    if peers:
        lines += [f"A run ended early: {run['ended_early']}." for run in peers["runs"] if "ended_early" in run]
        parameters = peers["runs"][0]["parameters"]
        lines.append(
            f"{model_of(peers['runs'][0])}, {parameters['threads']} threads, greedy, end of sequence ignored, seed {parameters['seed']}. "
            f"A turn counts as disturbed when other processes used more than {parameters['max_foreign_share']:.0%} of the cores or "
            f"the hypervisor took more than {parameters['max_stolen_share']:.0%}. "
            + ("The system in turn had the highest scheduling priority. " if parameters["favoured"] else "")
        )
    return "\n".join(lines)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(map(str, row)) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _targets(summary: Json) -> str:
    rows = []
    for outcome in outcomes(summary):
        target = outcome.target
        if outcome.ratio is None:
            verdict, ratio = f"not measured: {outcome.reason}", "–"
        else:
            bounds = [target.least, *([target.stretch] if target.stretch else [])]
            ratio = f"{shown(outcome.ratio, bounds)}×"
            verdict = "met" if outcome.met else f"missed: {shown(100 * outcome.ratio / target.least, [100], 0)}% of it"
            if target.stretch and outcome.ratio >= target.stretch:
                verdict = "met, stretch too"
        against = summary["systems"].get(outcome.against, {}).get("label", outcome.against or "–")
        ours = summary["systems"].get(outcome.ours, {}).get("label", outcome.ours)
        rows.append((target.what, outcome.case, ours, against, f"{target.least:g}×", ratio, verdict))
    return _table(("target", "case", "ours", "best peer", "at least", "measured", ""), rows)


def _rates(summary: Json) -> str:
    cases = summary["cases"]
    rows = [
        [said["label"], *(_rate(case["systems"].get(name), case["blocks"], said, at) for at, case in cases.items())]
        for name, said in summary["systems"].items()
    ]
    rows.append(
        [
            "limit of 16-bit weights, float products",
            *(str(case["limit"]["tokens_per_s"]) if case["limit"] else "–" for case in cases.values()),
        ]
    )
    return _table(("", *cases), rows)


def _rate(said: Json | None, blocks: int, system: Json, case: str) -> str:
    if said is None:
        return "failed" if case in system.get("failed", {}) else "–"
    if "tokens_per_s" not in said:
        return "failed" if said["failed"] else f"0 of {blocks}"
    rate = said["tokens_per_s"]
    return f"**{rate['median']}** ({rate['min']}–{rate['max']}), {len(rate['blocks'])} of {blocks}"


def _firsts(summary: Json) -> str:
    cases = summary["cases"]
    shares = {
        name: [case["systems"].get(name, {}).get("first_tokens_as_sluice") for case in cases.values()]
        for name in summary["systems"]
        if name != "sluice"
    }
    rows = [
        [summary["systems"][name]["label"], *("–" if share is None else f"{share:.1%}" for share in found)]
        for name, found in shares.items()
        if any(share is not None for share in found)
    ]
    return _table(("", *cases), rows) if rows else "Not measured: Sluice's 16-bit engine took no part."


def _probe(summary: Json) -> str:
    rows = [(name, said["median"], f"{said['min']}–{said['max']}") for name, said in summary["probe"].items()]
    return _table(("probe", "median", "range"), rows)


def _systems(peers: Json) -> str:
    rows = []
    for name, said in peers["summary"]["systems"].items():
        if "unavailable" in said:
            rows.append((said["label"], f"unavailable: {said['unavailable']}"))
            continue
        facts: Json = next(
            (run["systems"][name]["facts"] for run in peers["runs"] if "facts" in run["systems"].get(name, {})), {}
        )
        words = [f"{key} {value}" for key, value in facts.items() if not isinstance(value, list | dict)]
        words += [f"**failed at {case}: {reason}**" for case, reason in said.get("failed", {}).items()]
        rows.append((said["label"], "; ".join(words)))
    return _table(("system", "what it said of itself"), rows)


def _kernels(report: Json) -> str:
    rows = []
    for name, said in report["results"].items():
        if isinstance(said, dict) and "us" in said:
            limit = (
                (said["limit_us"], f"{said['share_of_limit']:.0%}", said["bound"])
                if "limit_us" in said
                else ("–", "–", "caches")
            )
            rows.append((name, said["us"]["median"], *limit))
    return _table(("operator", "µs", "limit µs", "share", "bound by"), rows)


def _others(suite: Json) -> str:
    lines = ["## The rest of the suite"]
    if "prefix" in suite:
        lines.append(f"Prefix sharing: `{json.dumps(suite['prefix']['results'])}`")
    if "waste" in suite:
        lines.append(f"KV slots without a live token: {suite['waste']['results']['wasted_share']:.2%}")
    if "scheduler" in suite:
        lines.append(f"Scheduler: `{json.dumps(suite['scheduler']['results'])}`")
    return "\n\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
