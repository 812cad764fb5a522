"""The benchmark against peers as one picture: a panel a case, a bar a system with its range, the machine's limit as a line."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

Json = dict[str, Any]

OURS, PEER, NARROW = "#1f6f8b", "#b8b8b8", "#d9a441"
"""Sluice, 16-bit and wider peers, and 8-bit and narrower peers."""


def draw(summary: Json, model: str, target: Path) -> None:
    """Writes a PNG. `model`: in words."""
    cases = {name: case for name, case in summary["cases"].items() if _measured(case)}
    columns = 2
    rows = -(-len(cases) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(12, 2.9 * rows), squeeze=False, layout="constrained")
    for panel, (name, case) in zip(panels.flat, cases.items(), strict=False):
        _panel(panel, name, case, summary["systems"])
    for panel in panels.flat[len(cases) :]:
        panel.set_axis_off()
    dashed = "dashed: this machine's limit with 16-bit weights and float products"
    figure.suptitle(f"{model}: tokens a second; {dashed}", fontsize=10)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def _measured(case: Json) -> dict[str, Json]:
    return {name: said["tokens_per_s"] for name, said in case["systems"].items() if "tokens_per_s" in said}


def _panel(panel: Axes, name: str, case: Json, systems: Json) -> None:
    rates = _measured(case)
    ordered = sorted(rates, key=lambda system: (systems[system]["kind"] != "ours", -rates[system]["median"]))
    medians = [rates[system]["median"] for system in ordered]
    below = [rates[system]["median"] - rates[system]["min"] for system in ordered]
    above = [rates[system]["max"] - rates[system]["median"] for system in ordered]
    colours = [_colour(systems[system]) for system in ordered]
    labels = [systems[system]["label"] for system in ordered]
    bars = panel.barh(labels, medians, xerr=[below, above], color=colours, ecolor="#444444", capsize=2)
    panel.bar_label(bars, fmt="%.4g", padding=6, fontsize=8)
    panel.invert_yaxis()
    if case["limit"]:
        panel.axvline(case["limit"]["tokens_per_s"], color="#a83232", linestyle="--", linewidth=1)
    panel.set_title(name, fontsize=9, loc="left")
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.12)


def _colour(system: Json) -> str:
    if system["kind"] == "ours":
        return OURS
    return PEER if system["bits"] >= 16 else NARROW
