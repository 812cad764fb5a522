"""What the demo shows, on terminals of several widths and on none."""

import io

import pytest
from rich.console import Console

from service.cli.demo_view import DemoView, Row, StreamView, results_table

ROW = Row(
    title="reader 1, again",
    request_id="sluice.prompts-3-0",
    prompt_tokens=200,
    cached_tokens=150,
    tokens=48,
    queue_ms=3.4,
    ttft_ms=250.6,
    tokens_per_s=31.25,
    finish_reason="length",
)


def console(width: int, *, terminal: bool = False) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=width, force_terminal=terminal, highlight=False, color_system=None), stream


def shown(width: int, rows: list[Row]) -> str:
    screen, stream = console(width)
    screen.print(results_table(rows, width))
    return stream.getvalue()


def test_the_table_holds_what_the_result_says() -> None:
    _, line = shown(140, [ROW]).splitlines()
    assert line.split() == [
        "reader",
        "1,",
        "again",
        "sluice.prompts-3-0",
        "200",
        "150",
        "(75%)",
        "48",
        "3",
        "251",
        "31.2",
        "length",
    ]


@pytest.mark.parametrize("width", [60, 70, 80, 100, 120])
def test_a_narrow_table_has_fewer_columns_and_cuts_no_cell(width: int) -> None:
    text = shown(width, [ROW])
    assert "…" not in text
    assert "150 (75%)" in text
    assert max(len(line) for line in text.splitlines()) <= width


def test_a_prompt_without_tokens_divides_by_nothing() -> None:
    assert "–" in shown(140, [Row(**{**{name: getattr(ROW, name) for name in Row.__slots__}, "prompt_tokens": 0})])


def test_off_a_terminal_each_finished_stream_is_one_line_with_the_results_own_count() -> None:
    screen, stream = console(80)
    view = StreamView("reader 1")
    with DemoView(screen, [view]) as demo:
        demo.chunk(view, "Par", 1)
        demo.finish(view, "Paris", 2)
        demo.chunk(view, "is", 1)
    assert stream.getvalue() == "  reader 1: 2 tokens\n"
    assert (view.text, view.num_tokens) == ("Paris", 2)


def test_panels_shrink_so_that_a_low_terminal_shows_them_all() -> None:
    stream = io.StringIO()
    screen = Console(file=stream, width=60, height=30, force_terminal=True, highlight=False, color_system=None)
    views = [StreamView(f"reader {number}") for number in range(1, 9)]
    screen.print(DemoView(screen, views).render())
    frame = stream.getvalue()
    assert [number for number in range(1, 9) if f"reader {number}" not in frame] == []
    assert len(frame.splitlines()) <= 30


@pytest.mark.parametrize("width", [40, 80, 160])
def test_on_a_terminal_the_panels_and_the_progress_are_drawn_within_its_width(width: int) -> None:
    screen, stream = console(width, terminal=True)
    views = [StreamView(f"reader {number}") for number in (1, 2, 3)]
    with DemoView(screen, views) as demo:
        demo.chunk(views[0], "a river [bold]of[/] words " * 40, 120)
        demo.finish(views[1], "Paris", 2)
    text = stream.getvalue()
    assert "1 of 3 answers" in text
    assert "[bold]of" in text
