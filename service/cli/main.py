"""The `sluice` command: names the commands, and turns every expected failure into one message and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 a dependency is unreachable, 130 interrupted.
Only the command that is asked for is loaded.
"""

import os
import sys
from collections.abc import Collection
from importlib import import_module

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


def _app(names: Collection[str]) -> typer.Typer:
    app = typer.Typer(name="sluice", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    # With a callback one command alone is still called by its name.
    app.callback(help="LLM inference that is native to Kafka and gRPC.")(lambda: None)
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
        _app(asked if asked and asked[0] in COMMANDS else COMMANDS)()
    except SetupError as error:
        _end(str(error), error.exit_code)
    except RequestError as error:
        _end(str(error), {"engine_failed": 3, "invalid_field": 2}.get(error.code, 1))
    except EngineError as error:
        _end(str(error), 2)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except BrokenPipeError:
        # The reader of a pipe (head, less) went away: nothing left to say, not even at interpreter shutdown.
        sys.stderr.close()
        sys.exit(0)


def _end(message: str, exit_code: int) -> None:
    err.print(f"[bold red]error:[/] {escape(message)}")
    sys.exit(exit_code)
