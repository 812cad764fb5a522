"""What Sluice has to reach against its peers, and whether a benchmark document shows it."""

from dataclasses import dataclass
from typing import Any

from tests.bench.report import exact_median

Json = dict[str, Any]

SHORT, LONG = ("decode 8/32", "decode 8/512"), ("decode 32/32", "decode 32/512")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`ours` over the best of `theirs` in each of `cases`, at least `least`.

    `theirs`: names with commas; "16+": every peer of 16 or more bits.
    """

    what: str
    cases: tuple[str, ...]
    ours: tuple[str, ...]
    theirs: str
    least: float
    stretch: float | None = None


WHOLE = ("sluice-child", "sluice")
"""The engine as the service drives it; in one process where that was not measured."""

TARGETS = (
    Target(what="batch 1", cases=("decode 1/32", "decode 1/512"), ours=WHOLE, theirs="16+", least=1.1),
    Target(what="batch 8", cases=SHORT, ours=WHOLE, theirs="16+", least=2.5, stretch=3.0),
    Target(what="batch 32", cases=LONG, ours=WHOLE, theirs="16+", least=2.0, stretch=2.5),
    Target(what="prefill of 512", cases=("prefill 512",), ours=WHOLE, theirs="16+", least=1.3),
    Target(
        what="against generate",
        cases=("decode 8/32", "decode 32/32"),
        ours=WHOLE,
        theirs="transformers-bf16,transformers-fp32",
        least=4.0,
        stretch=5.0,
    ),
    Target(
        what="INT8 against our bf16",
        cases=("decode 1/32", "decode 8/32", "decode 32/32"),
        ours=("sluice-int8",),
        theirs="sluice",
        least=1.6,
    ),
    Target(what="INT8, batch 1", cases=("decode 1/32",), ours=("sluice-int8",), theirs="llama.cpp-q8", least=1.2),
    Target(
        what="INT8, batches",
        cases=("decode 8/32", "decode 32/32"),
        ours=("sluice-int8",),
        theirs="llama.cpp-q8",
        least=3.0,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`ratio` None: not measured, for `reason`."""

    target: Target
    case: str
    ours: str
    against: str
    ratio: float | None
    reason: str = ""

    @property
    def met(self) -> bool:
        return self.ratio is not None and self.ratio >= self.target.least


def outcomes(summary: Json) -> list[Outcome]:
    """One for each target and case, in order."""
    return [_outcome(target, case, summary) for target in TARGETS for case in target.cases]


def _outcome(target: Target, case: str, summary: Json) -> Outcome:
    measured = summary["cases"].get(case, {"systems": {}, "ratios": {}})
    rates = {name: exact_median(said["tokens_per_s"]) for name, said in measured["systems"].items() if "tokens_per_s" in said}
    ours = next((name for name in target.ours if name in rates), target.ours[0])
    against = _opponent(target, rates, summary["systems"])
    found = measured["ratios"].get(ours, {}).get(against)
    ratio = exact_median(found) if found else None
    return Outcome(
        target=target,
        case=case,
        ours=ours,
        against=against,
        ratio=ratio,
        reason="" if ratio is not None else _why(summary, case, ours, against),
    )


def _opponent(target: Target, rates: dict[str, float], systems: Json) -> str:
    named = target.theirs.split(",")
    if named == ["16+"]:
        named = [name for name, said in systems.items() if said["kind"] == "peer" and said["bits"] >= 16]
    return max(named, key=lambda name: rates.get(name, 0.0), default="")


def _why(summary: Json, case: str, ours: str, against: str) -> str:
    for name in (ours, against):
        said = summary["systems"].get(name, {})
        if "unavailable" in said:
            return f"{said['label']}: {said['unavailable']}"
    if case not in summary["cases"]:
        return "the case was not run"
    for name in (ours, against):
        for where, reason in summary["systems"].get(name, {}).get("failed", {}).items():
            return f"{summary['systems'][name]['label']} failed at {where}: {reason}"
        if name not in summary["cases"][case]["systems"]:
            return f"{name} took no part" if name else "no peer took part"
    return "no block in which both were undisturbed"
