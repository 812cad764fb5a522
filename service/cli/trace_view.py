"""One trace as a tree in the terminal: name, kind, start after the root, duration, a bar on the trace's time line."""

from collections.abc import Iterable, Sequence

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

BAR_WIDTH = 32


def trace_table(spans: Iterable[ReadableSpan]) -> RenderableType:
    """The spans of one trace, children below their parents in order of start."""
    ordered = sorted(spans, key=lambda span: span.start_time or 0)
    known = {span.context.span_id for span in ordered}
    roots = [span for span in ordered if span.parent is None or span.parent.span_id not in known]
    start = min(span.start_time or 0 for span in ordered)
    end = max(span.end_time or 0 for span in ordered)
    table = Table(box=None, padding=(0, 1), show_edge=False)
    for heading, justify in (("span", "left"), ("kind", "left"), ("at ms", "right"), ("ms", "right"), ("", "left")):
        table.add_column(heading, justify=justify, style=None, no_wrap=True)  # type: ignore[arg-type]
    for root in roots:
        _add(table, root, ordered, start, max(1, end - start), prefix="", branch="")
    return table


def _add(
    table: Table, span: ReadableSpan, spans: Sequence[ReadableSpan], start: int, total: int, *, prefix: str, branch: str
) -> None:
    began, ended = (span.start_time or 0) - start, (span.end_time or 0) - start
    failed = span.status.status_code is StatusCode.ERROR
    left = int(began / total * BAR_WIDTH)
    width = max(1, round((ended - began) / total * BAR_WIDTH))
    table.add_row(
        Text(prefix + branch, style="dim") + Text(span.name, style="red" if failed else "bold"),
        Text(span.kind.name.lower(), style="dim"),
        f"{began / 1e6:,.1f}",
        f"{(ended - began) / 1e6:,.1f}",
        Text(" " * left + "━" * width, style="red" if failed else "cyan"),
    )
    children = [child for child in spans if child.parent is not None and child.parent.span_id == span.context.span_id]
    below = prefix + ("" if not branch else "   " if branch.startswith("└") else "│  ")
    for child in children:
        _add(table, child, spans, start, total, prefix=below, branch="└─ " if child is children[-1] else "├─ ")
