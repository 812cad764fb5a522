"""The targets of the service, start-up and memory, from the documents of `make bench`, as rows of the report."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.bench.report import exact_median, shown

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A figure of a benchmark and what it has to be: at most or at least `bound`."""

    what: str
    benchmark: str
    read: Callable[[Json], float]
    bound: float
    at_most: bool
    unit: str = ""


LIMITS = (
    Limit(
        what="gRPC against the engine offline",
        benchmark="service",
        read=lambda r: exact_median(r["grpc_against_offline"]),
        bound=0.9,
        at_most=False,
        unit="×",
    ),
    Limit(
        what="Kafka to Kafka against the engine offline",
        benchmark="service",
        read=lambda r: exact_median(r["kafka_against_offline"]),
        bound=0.9,
        at_most=False,
        unit="×",
    ),
    Limit(
        what="first token later than the engine's, gRPC, p99",
        benchmark="service_load",
        read=lambda r: r["added_ttft_ms"]["grpc"]["p99"],
        bound=8,
        at_most=True,
        unit=" ms",
    ),
    Limit(
        what="first token later than the engine's, Kafka, p99",
        benchmark="service_load",
        read=lambda r: r["added_ttft_ms"]["kafka"]["p99"],
        bound=20,
        at_most=True,
        unit=" ms",
    ),
    Limit(
        what="p99 / median of equal requests, worst of the loads",
        benchmark="service_load",
        read=lambda r: r["worst_p99_over_median"],
        bound=2,
        at_most=True,
        unit="×",
    ),
    Limit(
        what="ready beyond loading",
        benchmark="startup",
        read=lambda r: exact_median(r["ready_beyond_loading_s"]),
        bound=10,
        at_most=True,
        unit=" s",
    ),
    Limit(what="loading", benchmark="startup", read=lambda r: exact_median(r["load_s"]), bound=3, at_most=True, unit=" s"),
    Limit(
        what="host work in a step of 8 decodes",
        benchmark="step",
        read=lambda r: r["batch_8"]["host_percent"],
        bound=3,
        at_most=True,
        unit=" %",
    ),
    Limit(
        what="a step of 8 decodes and a chunk against the two apart",
        benchmark="mixed",
        read=lambda r: exact_median(r["mixed_of_the_sum"]),
        bound=1,
        at_most=True,
        unit="×",
    ),
    Limit(
        what="memory of the engine beside weights and KV cache, after requests",
        benchmark="startup",
        read=lambda r: exact_median(r["engine_beside_weights_and_kv_mib"]["after_requests"]),
        bound=600,
        at_most=True,
        unit=" MiB",
    ),
    Limit(
        what="memory of the service", benchmark="startup", read=lambda r: r["parent_mib"], bound=250, at_most=True, unit=" MiB"
    ),
)


def service_rows(suite: Json) -> str:
    """A Markdown table: each limit, met or by how much missed, or that its benchmark was not run."""
    lines = ["| figure | has to be | measured | |", "| --- | --- | --- | --- |"]
    for limit in LIMITS:
        wanted = f"{'≤' if limit.at_most else '≥'} {limit.bound:g}{limit.unit}"
        if limit.benchmark not in suite:
            lines.append(f"| {limit.what} | {wanted} | – | not measured: no `{limit.benchmark}` in these documents |")
            continue
        try:
            value = limit.read(suite[limit.benchmark]["results"])
        except (KeyError, TypeError):
            lines.append(f"| {limit.what} | {wanted} | – | not in these documents: `{limit.benchmark}` measured it otherwise |")
            continue
        met = value <= limit.bound if limit.at_most else value >= limit.bound
        verdict = "met" if met else f"missed: {shown(100 * value / limit.bound, [100], 0)}% of it"
        lines.append(f"| {limit.what} | {wanted} | {shown(value, [limit.bound])}{limit.unit} | {verdict} |")
    return "\n".join(lines)
