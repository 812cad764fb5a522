"""What `sluice bench` shows: a line of progress while it runs, a table at the end, or all of it as one JSON object."""

import asyncio
import os
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from service.bench.run import Bench, Plan, Run
from service.bench.summary import Quantiles
from service.cli import output

_REFRESH_S = 0.25
_PACKAGES = ("grpcio", "aiokafka", "h11", "uvloop")


class Report:
    """Of one command. `endpoint` is set once it is known. `asked`: what the plan does not say of the requests; `began`: UTC, ISO 8601."""

    def __init__(self, plan: Plan, work: Bench, *, seed: int, asked: dict[str, Any], began: str, as_json: bool) -> None:
        self._plan, self._work = plan, work
        self._asked, self._began = asked, began
        self._seed, self._as_json = seed, as_json
        self.endpoint: dict[str, Any] = {}

    async def watch(self) -> None:
        """Shows what is running until it is cancelled; nothing where standard error is no terminal."""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=output.err, transient=True, disable=not output.err.is_terminal) as bar:
            shown = bar.add_task("", total=None)
            while True:
                bar.update(shown, description=self._now())
                await asyncio.sleep(_REFRESH_S)

    def show(self, *, interrupted: bool = False) -> None:
        """Prints the figures."""
        runs = list(self._work.runs)
        if interrupted and (part := self._work.interrupted()) is not None:
            runs.append(part)
        if self._as_json:
            output.print_json(self._document(runs, interrupted))
        elif runs:
            output.out.print(rates(runs))
            output.out.print(latencies(runs))
            output.out.print(f"[dim]seed {self._seed}[/]")
            for run in runs:
                if failed := run.summary.num_requests - run.summary.num_finished:
                    of = f"of {run.summary.num_finished} finished, {failed} failed"
                    output.out.print(f"[red]{escape(run.name)}: latencies {of}[/]")
                for code, count in run.summary.errors.items():
                    output.out.print(f"[red]{escape(run.name)}: {count} x {escape(code)}[/]")

    def _now(self) -> str:
        work, drive = self._work, self._work.current
        if drive is None:
            return work.current_name
        samples, limits = drive.samples, self._plan.limits
        failed = sum(sample.answer is None for sample in samples)
        of = f"/{limits.max_requests}" if limits.max_requests else ""
        failures = f", [red]{failed} failed[/]" if failed else ""
        return (
            f"run {len(work.runs) + 1}/{work.num_runs}: {escape(work.current_name)}: "
            f"{len(samples)}{of} ended, {drive.num_in_flight} in flight{failures}"
        )

    def _document(self, runs: list[Run], interrupted: bool) -> dict[str, Any]:
        return {
            "benchmark": "serving",
            "sluice": version("sluice"),
            "commit": commit(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in _PACKAGES},
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "time": self._began,
            "parameters": asdict(self._plan) | {"seed": self._seed} | self._asked,
            "endpoint": self.endpoint,
            "interrupted": interrupted,
            "runs": [
                {"name": run.name, "concurrency": run.concurrency, "rate": round(run.rate, 4), "load": run.load}
                | run.summary.as_json()
                for run in runs
            ],
        }


def rates(runs: list[Run]) -> Table:
    """What each run did."""
    table = _table("Throughput", ("ended well", "requests/s", "goodput/s", "tokens/s", "E-TPS", "prompt tokens", "cached"))
    for run in runs:
        it = run.summary
        table.add_row(
            run.name,
            f"{it.num_finished}/{it.num_requests}",
            f"{it.requests_per_s:.2f}",
            f"{it.goodput_per_s:.2f}",
            f"{it.output_tokens_per_s:.1f}",
            "-" if it.e_tps is None else f"{it.e_tps:.1f}",
            f"{it.prompt_tokens:,}",
            f"{it.cached_prompt_tokens:,}",
        )
    return table


def latencies(runs: list[Run]) -> Table:
    """p50, p90 and p99 of each."""
    table = _table("Latency in ms: p50/p90/p99", ("TTFT", "TPOT", "ITL", "end to end", "p99/p50"))
    for run in runs:
        it = run.summary
        ratio = "-" if it.p99_over_median is None else f"{it.p99_over_median:.2f}"
        table.add_row(run.name, *map(_three, (it.ttft_ms, it.tpot_ms, it.itl_ms, it.e2e_ms)), ratio)
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _three(found: Quantiles | None) -> str:
    if found is None:
        return "-"
    return "/".join(f"{value:.{1 if value < 100 else 0}f}" for value in (found.p50, found.p90, found.p99))


def _cpu_model() -> str:
    """Of this machine, which the endpoint need not be on; as Linux names it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str:
    """Of the checkout that this runs from; "" for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
