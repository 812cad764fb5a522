"""A trace as a tree in the terminal."""

import io

import pytest
from rich.console import Console

from service.cli.trace_view import trace_table
from service.config import TracingSection
from service.telemetry import tracing
from service.telemetry.tracing import Tracing

MS = 1_000_000


def drawn(spans: tuple[object, ...], width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(trace_table(spans, width))  # type: ignore[arg-type]
    return [line.rstrip() for line in stream.getvalue().splitlines()]


@pytest.fixture
def spans() -> tuple[object, ...]:
    """root 0..100 ms with the children b (50..100, with a child of its own) and a (0..50)."""
    owner = Tracing(TracingSection(), memory=True, wall_ns=lambda: MS, monotonic_ns=lambda: MS)
    root = owner.start("root", at_ns=1 * MS)
    late = owner.start("b", parent=tracing.context_of(root), at_ns=51 * MS)
    leaf = owner.start("leaf", parent=tracing.context_of(late), at_ns=76 * MS)
    early = owner.start("a", parent=tracing.context_of(root), at_ns=1 * MS)
    tracing.record_error(early, "cancelled")
    for span, end in ((leaf, 101), (late, 101), (early, 51), (root, 101)):
        owner.end(span, at_ns=end * MS)
    return owner.spans()


def test_children_stand_below_their_parents_in_order_of_start(spans: tuple[object, ...]) -> None:
    _, *lines = drawn(spans, 120)
    assert [line[: line.index("internal")].rstrip() for line in lines] == [" root", " ├─ a", " └─ b", "    └─ leaf"]
    assert [line.split("internal")[1].split()[:2] for line in lines] == [
        ["0.0", "100.0"],
        ["0.0", "50.0"],
        ["50.0", "50.0"],
        ["75.0", "25.0"],
    ]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_bars_stay_within_the_width(spans: tuple[object, ...], width: int) -> None:
    lines = drawn(spans, width)
    assert max(len(line) for line in lines) <= width
    assert not any("…" in line for line in lines)
    bars = [line.count("━") for line in lines[1:]]
    # Whole characters: each bar is its share of the longest to within one.
    assert all(abs(bar - bars[0] * share) <= 1 for bar, share in zip(bars, (1.0, 0.5, 0.5, 0.25), strict=True)), bars


def test_a_span_whose_parent_was_not_kept_is_a_root(spans: tuple[object, ...]) -> None:
    orphans = tuple(span for span in spans if span.name != "root")  # type: ignore[attr-defined]
    assert [line.split()[0] for line in drawn(orphans, 100)[1:]] == ["a", "b", "└─"]


def test_without_spans_it_says_so() -> None:
    assert drawn((), 80) == ["no spans were kept"]
