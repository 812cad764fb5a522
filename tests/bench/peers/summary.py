"""What the blocks come to: medians of undisturbed turns, ratios within a block, limits from the probes beside them."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tests.bench.peers.cases import CASES, Case
from tests.bench.peers.models import DEMO, RANDOM, TRAINED
from tests.bench.report import spread

Json = dict[str, Any]


BEFORE = {"model": DEMO, "weights": TRAINED}
"""What runs had that say nothing of it: those of before --model, --busy and --quiet-with; 0 for the rest."""


class MergeError(ValueError):
    """Runs that do not belong together; one line."""


def document(runs: list[Json]) -> Json:
    """The whole benchmark as one JSON object. Raises `MergeError`."""
    if not runs:
        raise MergeError("there is no run: name files to merge, or measure")
    check(runs)
    return {"benchmark": "peers", "summary": summarise(runs), "runs": runs}


def check(runs: Sequence[Json]) -> None:
    """Raises `MergeError` for runs of different commits, machines, models, company or seeds, and where one of several was measured with
    a tree that its commit does not tell. Looks at their `environment` and `parameters` alone."""
    alike = {
        "environment": ("commit", "cpu", "cores"),
        "parameters": ("model", "weights", "seed", "threads", "busy_processes", "favoured", "held"),
    }
    for part, names in alike.items():
        for name in names:
            values = {run[part].get(name, BEFORE.get(name, 0)) for run in runs}
            if len(values) > 1:
                raise MergeError(f"the runs differ in {name}: {', '.join(sorted(map(str, values)))}")
    if len(runs) > 1 and any(run["environment"]["modified"] for run in runs):
        raise MergeError("a run of a modified tree merges with no other: nothing tells that the changes were the same")


def model_of(run: Json) -> str:
    """The model of a run in words, which say so where its weights are random."""
    known = BEFORE | run["parameters"]
    return f"{known['model']} (random weights of its shape)" if known["weights"] == RANDOM else str(known["model"])


def summarise(runs: list[Json]) -> Json:
    """By case: each system's tokens a second, ms a step, ratio to each of ours, and the limits of the machine in those blocks."""
    systems: Json = {}
    for run in runs:
        for name, said in run["systems"].items():
            if "unavailable" not in said or name not in systems:
                failed = systems.get(name, {}).get("failed", {}) | said.get("failed", {})
                systems[name] = {key: said[key] for key in ("label", "kind", "bits", "unavailable") if key in said}
                systems[name] |= {"failed": failed} if failed else {}
    blocks = [block for run in runs for block in run["blocks"]]
    model = _model(runs)
    cases = {name: _case(case, [b for b in blocks if b["case"] == name], model) for name, case in CASES.items()}
    return {
        "systems": systems,
        "model": model,
        "probe": _spreads(block["probe"] for block in blocks),
        "cases": {name: case for name, case in cases.items() if case is not None},
    }


def rate(case: Case, turn: Json) -> float:
    """Tokens a second of a turn: decoded in its window, or prefilled up to the first token."""
    if case.new_tokens == 1:
        return case.batch * case.prompt_tokens / float(turn["first_s"])
    return float(turn["window_tokens"] / turn["window_s"])


def ratios(case: Case, blocks: Iterable[Json], mine: str, theirs: str) -> list[float]:
    """`mine` over `theirs` in each block in which neither was disturbed."""
    pairs = [(block["turns"].get(mine), block["turns"].get(theirs)) for block in blocks]
    return [rate(case, a) / rate(case, b) for a, b in pairs if a and b and _counts(case, a) and _counts(case, b)]


def failure_of(case: Case, turn: Json) -> str:
    """Why a turn has no figures; "" where it has."""
    if "failed" in turn:
        return str(turn["failed"])
    if case.new_tokens > 1 and not turn["window_s"]:
        return "a sequence ended before another had its first token: the whole batch never decoded"
    return ""


def _counts(case: Case, turn: Json) -> bool:
    return not failure_of(case, turn) and not turn["disturbed"]


def _model(runs: list[Json]) -> Json:
    """Size of the model as our engine tells it, for the limits; empty where it did not run."""
    for run in runs:
        for said in run["systems"].values():
            if said["kind"] == "ours" and said["bits"] == 16 and "facts" in said:
                facts = said["facts"]
                return {
                    "weight_bytes": facts["weight_bytes"],
                    "num_parameters": facts["num_parameters"],
                    "num_head_parameters": facts.get("vocab_size", 0)
                    * facts.get("hidden_size", 0),  # runs of before do not tell
                    "kv_bytes_per_token": round(facts["kv_cache_bytes"] / facts["num_blocks"] / facts["block_size"]),
                }
    return {}


def _case(case: Case, blocks: list[Json], model: Json) -> Json | None:
    if not blocks:
        return None
    names = list(dict.fromkeys(name for block in blocks for name in block["turns"]))
    rates: Json = {}
    for name in names:
        turns = [block["turns"][name] for block in blocks if name in block["turns"]]
        good = [turn for turn in turns if _counts(case, turn)]
        firsts = [share for turn in good if (share := turn.get("first_tokens_as_sluice")) is not None]
        entry: Json = {
            "disturbed": sum(turn.get("disturbed", False) for turn in turns),
            "failed": [reason for turn in turns if (reason := failure_of(case, turn))],
        }
        if good:
            entry["tokens_per_s"] = spread([rate(case, turn) for turn in good], 1)
            entry["ttft_ms"] = spread([turn["first_s"] * 1e3 for turn in good], 1)
            if firsts:
                entry["first_tokens_as_sluice"] = round(statistics.fmean(firsts), 3)
            if steps := [step for turn in good for step in turn["step_s"]]:
                entry["step_ms"] = {"median": round(statistics.median(steps) * 1e3, 2), "max": round(max(steps) * 1e3, 2)}
        rates[name] = entry
    return {
        "blocks": len(blocks),
        "systems": rates,
        "ratios": {
            mine: {
                theirs: spread(found) for theirs in names if theirs != mine and (found := ratios(case, blocks, mine, theirs))
            }
            for mine in names
            if mine.startswith("sluice")
        },
        "limit": _limit(case, [block["probe"] for block in blocks], model) if model else None,
    }


def _limit(case: Case, probes: list[Json], model: Json) -> Json:
    """The most tokens a second that the machine's bandwidth and float products allow 16-bit weights, by the probes' medians.

    A step reads every weight once and the KV of every sequence; each token costs two operations a parameter, but the head's are for
    tokens that are followed by a new one: of a prompt, one. Bytes and operations may overlap, so the slower of the two bounds. Prefill
    reads the weights once. Whole numbers of 16 bits, as our operators multiply where the processor has no bfloat16 products, may go past
    the bound of arithmetic: two such products take a float one's time.
    """
    median = {name: statistics.median(probe[name] for probe in probes) for name in probes[0]}
    bytes_per_s = median["read_gb_per_s"] * 1e9
    flop_per_s = max(median["fp32_gflop_per_s"], median["bf16_gflop_per_s"]) * 1e9
    decodes = case.new_tokens > 1
    tokens = case.batch if decodes else case.batch * case.prompt_tokens
    context = case.prompt_tokens * case.batch * model["kv_bytes_per_token"] if decodes else 0
    read_s = (model["weight_bytes"] + context) / bytes_per_s
    head = model["num_head_parameters"]
    compute_s = 2 * (tokens * (model["num_parameters"] - head) + case.batch * head) / flop_per_s
    return {
        "bandwidth_tokens_per_s": round(tokens / read_s, 1),
        "arithmetic_tokens_per_s": round(tokens / compute_s, 1),
        "tokens_per_s": round(tokens / max(read_s, compute_s), 1),
    }


def _spreads(probes: Iterator[Mapping[str, float]] | Iterable[Mapping[str, float]]) -> Json:
    listed = list(probes)
    return {name: spread([probe[name] for probe in listed], 1) for name in listed[0]} if listed else {}
