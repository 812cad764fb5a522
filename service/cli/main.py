"""The `sluice` command: names the commands, and turns every expected failure into one message and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 a dependency is unreachable, 130 interrupted.
Only the command that is asked for is loaded.
"""

import os
import sys
from collections.abc import Collection
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, NoReturn

# Read when gRPC is imported. Children are started by exec, which needs none of its fork handlers: they only log at each start.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import typer
from rich.markup import escape

from engine import EngineError
from service.cli.output import err
from service.errors import RequestError, SetupError

COMMANDS = {
    "demo": "demo:demo",
    "serve": "serve:serve",
    "generate": "generate:generate",
    "publish": "kafka:publish",
    "tail": "tail:tail",
    "stream": "stream:stream",
    "submit": "durable:submit",
    "attach": "durable:attach",
    "get": "durable:get",
    "cancel": "durable:cancel",
    "bench": "bench:bench",
    "doctor": "doctor:doctor",
    "model": "model:app",
    "topics": "topics:app",
    "offsets": "offsets:app",
    "dlq": "dlq:app",
    "config": "config:app",
}
"""Each with its module here and the name in it: a function, or a group of commands."""


def _show_version(asked: bool) -> None:
    if asked:
        print(f"sluice {version('sluice')}")
        raise typer.Exit


def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Nothing: with a callback one command alone is still called by its name."""


def _app(names: Collection[str]) -> typer.Typer:
    app = typer.Typer(name="sluice", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback(help="LLM inference that is native to Kafka and gRPC.")(_start)
    for name in names:
        module, _, attribute = COMMANDS[name].partition(":")
        command = getattr(import_module(f"service.cli.{module}"), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def main() -> None:
    """The console script. Never shows a traceback for what a user can cause."""
    asked = sys.argv[1:2]
    try:
        try:
            _app(asked if asked and asked[0] in COMMANDS else COMMANDS)()
        finally:
            # Not left to the interpreter's own end, where nobody hears that it failed.
            sys.stdout.flush()
    except SystemExit as end:
        # Typer's own answer to a broken pipe is exit code 1.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        _end_quietly()
    except SetupError as error:
        _end(str(error), error.exit_code)
    except RequestError as error:
        _end(str(error), {"engine_failed": 3, "invalid_field": 2}.get(error.code, 1))
    except EngineError as error:
        _end(str(error), 2)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except BrokenPipeError:
        _end_quietly()
    except OSError as error:
        # What a full disk or a missing right does to a command; to standard output, too.
        _drop_output()
        named = f"{error.filename}: " if error.filename else ""
        _end(f"{named}{error.strerror or error}", 1)


def _end_quietly() -> NoReturn:
    """The reader of a pipe (head, less) went away: nothing is left to say."""
    _drop_output()
    sys.exit(0)


def _drop_output() -> None:
    """What could not be written is not tried again, and complained of, at interpreter shutdown."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(message: str, exit_code: int) -> None:
    err.print(f"[bold red]error:[/] {escape(message)}")
    sys.exit(exit_code)
