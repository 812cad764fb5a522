"""One line a thing, in one format, with trace ids and without text or secrets."""

import io
import json
import logging

import pytest
import structlog

from service.config import LoggingSection, TracingSection
from service.telemetry.logging import _QUIET, REDACTED, configure, fault
from service.telemetry.tracing import Tracing, trace_id


@pytest.fixture
def restored():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in (*_QUIET, "grpc._cython.cygrpc")}
    yield
    root.handlers[:], root.level = before
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def lines(restored):
    out = io.StringIO()
    configure(LoggingSection(format="json"), out)
    return lambda: [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_line_off_a_terminal_is_json(lines):
    structlog.get_logger("mine").info("request finished", total_ms=3.5)
    (line,) = lines()
    assert (line["event"], line["total_ms"], line["level"], line["logger"]) == ("request finished", 3.5, "info", "mine")
    assert line["timestamp"].endswith("Z")


def test_a_console_line_is_for_people(restored):
    out = io.StringIO()
    configure(LoggingSection(format="console"), out)
    structlog.get_logger("mine").info("request finished", total_ms=3.5)
    assert "request finished" in out.getvalue()
    assert "total_ms=3.5" in out.getvalue()


def test_whatever_a_field_holds_the_line_is_json(lines):
    log = structlog.get_logger("mine")
    log.warning("odd", what=object, number=float("nan"))
    log.warning("no UTF-8", file="\udce9.json", what=object)
    first, second = lines()
    assert (first["what"], first["number"]) == ("<class 'object'>", None)
    assert (second["what"], second["file"]) == ("<class 'object'>", "\udce9.json")


def test_standard_library_lines_come_in_the_same_format(lines):
    logging.getLogger("aiokafka.consumer").warning("lost %s", "it")
    (line,) = lines()
    assert (line["event"], line["level"], line["logger"]) == ("lost it", "warning", "aiokafka.consumer")


def test_chatty_libraries_are_held_to_warnings(lines):
    logging.getLogger("aiokafka.consumer").info("noise")
    assert lines() == []


def test_lines_below_the_level_are_dropped(restored):
    out = io.StringIO()
    configure(LoggingSection(format="json", level="warning"), out)
    structlog.get_logger("mine").info("quiet")
    structlog.get_logger("mine").warning("loud")
    assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == ["loud"]


def test_a_line_about_a_span_carries_its_ids(lines):
    span = Tracing(TracingSection(), memory=True).start("x")
    structlog.get_logger().info("hello", span=span)
    (line,) = lines()
    assert line["trace_id"] == trace_id(span)
    assert "span" not in line


@pytest.mark.parametrize("key", ["prompt", "text", "messages", "token_ids", "Content"])
def test_text_is_redacted_at_any_depth(lines, key):
    structlog.get_logger().info("x", **{key: "canary"}, inner={"deep": [{key: "canary"}]})
    (line,) = lines()
    assert line[key] == REDACTED
    assert "canary" not in json.dumps(line)


def test_counts_are_no_text(lines):
    structlog.get_logger().info("x", tokens=12)
    assert lines()[0]["tokens"] == 12


@pytest.mark.parametrize("key", ["sasl_password", "Authorization", "api-key", "client_secret"])
def test_secrets_are_redacted_even_when_content_is_captured(restored, key):
    out = io.StringIO()
    configure(LoggingSection(format="json", capture_content=True), out)
    structlog.get_logger().info("x", **{key: "canary", "prompt": "shown"})
    line = json.loads(out.getvalue())
    assert (line[key], line["prompt"]) == (REDACTED, "shown")


def test_a_fault_says_where_and_never_what(lines):
    try:
        raise ValueError("canary")
    except ValueError as error:
        structlog.get_logger().error("failed", **fault(error))
    (line,) = lines()
    assert line["error"] == "ValueError"
    assert "test_logging.py" in line["where"][-1]
    assert "canary" not in json.dumps(line)


@pytest.mark.parametrize("style", ["json", "console"])
def test_configuring_leaves_one_handler_and_every_style_takes_a_list(restored, style):
    out = io.StringIO()
    configure(LoggingSection(format=style), out)
    configure(LoggingSection(format=style), out)
    structlog.get_logger().info("once", where=["a", "b"])
    assert out.getvalue().count("once") == 1


def test_lines_go_to_what_standard_error_is_when_they_are_written(restored, monkeypatch):
    configure(LoggingSection())
    bar = io.StringIO()
    monkeypatch.setattr("sys.stderr", bar)
    structlog.get_logger("t").warning("while a bar is drawn")
    assert "while a bar is drawn" in bar.getvalue()


def test_quiet_lets_critical_lines_through_alone(restored):
    stream = io.StringIO()
    configure(LoggingSection(level="debug"), stream, quiet=True)
    structlog.get_logger("t").error("not this")
    structlog.get_logger("t").critical("but this")
    assert ("not this" in stream.getvalue(), "but this" in stream.getvalue()) == (False, True)
