"""Structured logs on standard error: JSON off a terminal, console on one; one format for ours and for other libraries' lines.

Guarantees: a line inside a trace carries its trace id; fields that may hold prompt or completion text are redacted unless
`logging.capture_content` is on; fields named like a secret are redacted always, at any depth. A line is one write.
"""

import json
import logging
import sys
import traceback
from collections.abc import Mapping, MutableMapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import msgspec
import structlog
from opentelemetry.trace import Span, format_span_id, format_trace_id
from structlog.typing import EventDict, Processor

from service.config import LoggingSection
from service.telemetry import names

REDACTED = "[redacted]"

_MAX_DEPTH = 4
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

# What these say at INFO is of no use to an operator of Sluice; their warnings come through.
_QUIET = ("aiokafka", "kafka", "uvicorn", "uvicorn.access", "httpx", "grpc", "asyncio", "opentelemetry")


def configure(section: LoggingSection, stream: TextIO | None = None, *, quiet: bool = False) -> None:
    """Routes structlog and the standard library's logging to `stream` (default: standard error). Called once, by a command.

    `quiet`: critical lines alone, for a command whose failures reach the person as its one error message.
    """
    out = sys.stderr if stream is None else stream
    console = section.format == "console" or (section.format == "auto" and out.isatty())
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        _trace_ids,
        structlog.processors.TimeStamper(fmt="%H:%M:%S.%f" if console else "iso", utc=not console),
        structlog.processors.format_exc_info if not console else _keep,
        Redactor(capture_content=section.capture_content),
    ]
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=out.isatty()) if console else structlog.processors.JSONRenderer(_to_json)
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
    handler = _StandardError() if stream is None else logging.StreamHandler(out)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.CRITICAL if quiet else _LEVELS[section.level])
    for name in _QUIET:
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        logger.propagate = True
        logger.setLevel(logging.CRITICAL if quiet else logging.WARNING)
    # It reports each client that went away while a status was being sent as an error; calls that fail are logged by service/rpc.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what standard error is at that moment: a progress bar takes its place while it is drawn, and moves below the line."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        """Fixed: always standard error."""


def fault(error: BaseException) -> dict[str, Any]:
    """Fields that say where an unexpected error came from: its type and stack, never its message, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    return {"error": type(error).__name__, "where": [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-12:]]}


def _keep(logger: object, method: str, event: EventDict) -> EventDict:
    return event


def _trace_ids(logger: object, method: str, event: EventDict) -> EventDict:
    # Sluice has no current span: whoever logs passes `span=`, and its ids take its place.
    span = event.pop("span", None)
    if isinstance(span, Span) and (context := span.get_span_context()).is_valid:
        event[names.LOG_TRACE_ID] = format_trace_id(context.trace_id)
        event[names.LOG_SPAN_ID] = format_span_id(context.span_id)
    return event


@lru_cache(maxsize=1024)
def _kind(key: str) -> tuple[bool, bool]:
    """Whether a field of this name is a secret, and whether it may hold text."""
    lowered = key.lower().replace("-", "_")
    return any(word in lowered for word in names.SECRET_LOG_WORDS), lowered in names.TEXT_LOG_FIELDS


def _to_json(event: EventDict, **_: object) -> str:
    try:
        return msgspec.json.encode(event, enc_hook=repr).decode()
    except UnicodeEncodeError:
        # Half of a surrogate pair, as in a file's name that is no UTF-8.
        return json.dumps(event, default=repr)


class Redactor:
    """A structlog processor that replaces what must not be logged by `REDACTED`; the fields stay, so that their absence is seen."""

    def __init__(self, *, capture_content: bool) -> None:
        self._capture_content = capture_content

    def __call__(self, logger: object, method: str, event: MutableMapping[str, Any]) -> EventDict:
        return {key: value if key == "event" else self._clean(key, value, 0) for key, value in event.items()}

    def _clean(self, key: str, value: Any, depth: int) -> Any:
        is_secret, is_text = _kind(key)
        if is_secret:
            return REDACTED
        # A number says nothing of the text: `tokens=12` is a count.
        if is_text and not self._capture_content and not isinstance(value, int | float | None):
            return REDACTED
        if isinstance(value, Mapping):
            if depth == _MAX_DEPTH:
                return REDACTED
            return {inner: self._clean(str(inner), item, depth + 1) for inner, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._clean("", item, depth + 1) if isinstance(item, Mapping) else item for item in value]
        return value
