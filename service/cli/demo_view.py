"""What `sluice demo` shows: the streams side by side while they run, then a table of what each one took."""

from dataclasses import dataclass
from typing import Literal

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

MAX_PANEL_LINES = 7
MAX_COLUMNS = 4


@dataclass(slots=True)
class StreamView:
    """One prompt of the demo as its chunks arrive."""

    title: str
    request_id: str = ""
    text: str = ""
    num_tokens: int = 0
    done: bool = False

    def panel(self, width: int, lines: int = MAX_PANEL_LINES) -> Panel:
        """A box of `width` columns with the last `lines` lines of the text."""
        state = "[green]done[/]" if self.done else f"{self.num_tokens} tokens" if self.num_tokens else "[dim]waiting[/]"
        return Panel(
            _tail(self.text, width - 4, lines),
            title=f"[bold]{self.title}[/]",
            subtitle=state,
            width=width,
            height=lines + 2,
            border_style="green" if self.done else "cyan" if self.num_tokens else "dim",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One finished request in the table; read from its result record."""

    title: str
    request_id: str
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    queue_ms: float
    ttft_ms: float
    tokens_per_s: float
    finish_reason: str


class DemoView:
    """Draws live on a terminal; elsewhere prints one line a finished stream."""

    def __init__(self, console: Console, streams: list[StreamView]) -> None:
        self._console = console
        self._streams = streams
        self._live = Live(console=console, refresh_per_second=12, transient=False, get_renderable=self.render)

    def __enter__(self) -> "DemoView":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def chunk(self, stream: StreamView, text: str, num_tokens: int) -> None:
        if stream.done:
            return
        stream.text += text
        stream.num_tokens += num_tokens

    def finish(self, stream: StreamView, text: str, num_tokens: int) -> None:
        """The result's own text and count: its record may be read before the last chunks of another topic."""
        stream.text, stream.num_tokens = text, num_tokens
        stream.done = True
        if not self._console.is_terminal:
            self._console.print(f"  {stream.title}: {stream.num_tokens} tokens")

    def render(self) -> RenderableType:
        """The frame now, within the console's width and height where that is possible."""
        columns = min(MAX_COLUMNS, max(1, self._console.width // 38), len(self._streams))
        width = self._console.width // columns - 1
        rows = -(-len(self._streams) // columns)
        # What is higher than the terminal would be cut off at the bottom: two border lines a row, two lines of progress.
        lines = max(1, min(MAX_PANEL_LINES, (self._console.height - 3) // rows - 2))
        done = sum(stream.done for stream in self._streams)
        tokens = sum(stream.num_tokens for stream in self._streams)
        bar = Columns(
            [
                ProgressBar(total=len(self._streams), completed=done, width=40),
                Text(f"{done} of {len(self._streams)} answers · {tokens} tokens"),
            ]
        )
        return Group(Columns([stream.panel(width, lines) for stream in self._streams], width=width, padding=(0, 0)), bar)


def results_table(rows: list[Row], width: int) -> Table:
    """What each request took. A terminal of `width` columns that cannot show all shows fewer: the id goes first."""
    columns = [
        _Column("request", "left", [row.title for row in rows]),
        _Column("id", "left", [row.request_id for row in rows], dropped=1),
        _Column("prompt", "right", [str(row.prompt_tokens) for row in rows], dropped=4),
        _Column("from cache", "right", [_share(row.cached_tokens, row.prompt_tokens) for row in rows]),
        _Column("tokens", "right", [str(row.tokens) for row in rows]),
        _Column("queue ms", "right", [f"{row.queue_ms:.0f}" for row in rows], dropped=3),
        _Column("TTFT ms", "right", [f"{row.ttft_ms:.0f}" for row in rows]),
        _Column("tokens/s", "right", [f"{row.tokens_per_s:.1f}" for row in rows]),
        _Column("end", "left", [row.finish_reason for row in rows], dropped=2),
    ]
    for rank in (1, 2, 3, 4):
        if sum(column.width for column in columns) <= width:
            break
        columns = [column for column in columns if column.dropped != rank]
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for column in columns:
        table.add_column(column.heading, justify=column.justify, style="dim" if column.heading == "id" else None, no_wrap=True)
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*(Text(cell) for cell in cells))
    return table


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the table; `dropped` above 0: it goes in that turn when the terminal is narrow."""

    heading: str
    justify: Literal["left", "right"]
    cells: list[str]
    dropped: int = 0

    @property
    def width(self) -> int:
        return max(map(len, [self.heading, *self.cells])) + 2


def _share(cached: int, prompt: int) -> str:
    return f"{cached} ({cached / prompt:.0%})" if prompt else "–"


def _tail(text: str, width: int, lines: int) -> Text:
    """The last lines of `text` as they wrap in `width` columns."""
    wrapped: list[str] = []
    for line in text.split("\n"):
        while len(line) > width:
            cut = line.rfind(" ", 1, width + 1)
            cut = cut if cut > 0 else width
            wrapped.append(line[:cut])
            line = line[cut:].lstrip(" ")
        wrapped.append(line)
    return Text("\n".join(wrapped[-lines:]))
