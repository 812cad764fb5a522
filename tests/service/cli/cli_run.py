"""Runs the `sluice` command in this process, as the console script would."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import structlog

from service.cli import main


@contextmanager
def kept_logging() -> Iterator[None]:
    """Commands set up logging for their whole process; this one's is put back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    levels = {name: logger.level for name, logger in root.manager.loggerDict.items() if isinstance(logger, logging.Logger)}
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for name, logger in root.manager.loggerDict.items():
            if isinstance(logger, logging.Logger):
                logger.setLevel(levels.get(name, logging.NOTSET))
        structlog.reset_defaults()


class Sluice:
    """`run("config", "check")` gives (exit code, standard output, standard error)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def run(self, *arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
        with self._monkeypatch.context() as patch, kept_logging():
            patch.setattr("sys.argv", ["sluice", *arguments])
            for name, value in (environment or {}).items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                main.main()
        out, err = self._capsys.readouterr()
        return int(ended.value.code or 0), out, err
