"""One trace as a tree in the terminal: name, kind, start after the root, duration, a bar on the trace's time line."""

from collections.abc import Iterable, Iterator, Sequence

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

MIN_BAR_WIDTH, MAX_BAR_WIDTH = 8, 60

_Line = tuple[str, ReadableSpan]
"""The tree's branches before a span's name, and the span."""


def trace_table(spans: Iterable[ReadableSpan], width: int = 120) -> RenderableType:
    """The spans of one trace, children below their parents in order of start; the bars take what `width` columns leave.

    A span whose parent is not among them is a root. Without spans: words that say so.
    """
    ordered = sorted(spans, key=lambda span: span.start_time or 0)
    if not ordered:
        return Text("no spans were kept", style="dim")
    known = {span.context.span_id for span in ordered}
    roots = [span for span in ordered if span.parent is None or span.parent.span_id not in known]
    lines = [line for root in roots for line in _lines(root, ordered, prefix="", branch="")]
    start = min(span.start_time or 0 for span in ordered)
    total = max(1, max(span.end_time or 0 for span in ordered) - start)
    # kind, two times and the columns' padding take 40.
    names = max(len(branches) + len(span.name) for branches, span in lines)
    bar_width = max(MIN_BAR_WIDTH, min(MAX_BAR_WIDTH, width - names - 40))
    table = Table(box=None, padding=(0, 1), show_edge=False)
    table.add_column("span", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("at ms", justify="right", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for branches, span in lines:
        _add(table, branches, span, start, total, bar_width)
    return table


def _lines(span: ReadableSpan, spans: Sequence[ReadableSpan], *, prefix: str, branch: str) -> Iterator[_Line]:
    yield prefix + branch, span
    children = [child for child in spans if child.parent is not None and child.parent.span_id == span.context.span_id]
    below = prefix + ("" if not branch else "   " if branch.startswith("└") else "│  ")
    for child in children:
        yield from _lines(child, spans, prefix=below, branch="└─ " if child is children[-1] else "├─ ")


def _add(table: Table, branches: str, span: ReadableSpan, start: int, total: int, bar_width: int) -> None:
    began, ended = (span.start_time or 0) - start, (span.end_time or 0) - start
    failed = span.status.status_code is StatusCode.ERROR
    left = min(bar_width - 1, int(began / total * bar_width))
    length = max(1, min(bar_width - left, round((ended - began) / total * bar_width)))
    table.add_row(
        Text(branches, style="dim") + Text(span.name, style="red" if failed else "bold"),
        Text(span.kind.name.lower(), style="dim"),
        f"{began / 1e6:,.1f}",
        f"{(ended - began) / 1e6:,.1f}",
        Text(" " * left + "━" * length, style="red" if failed else "cyan"),
    )
