"""The `sluice` command: names the commands, and turns every expected failure into one message and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 a dependency is unreachable, 130 interrupted.
"""

import os
import sys

# Read when gRPC is imported. Children are started by exec, which needs none of its fork handlers: they only log at each start.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import typer
from rich.markup import escape

from engine import EngineError
from service.cli import bench, config, demo, dlq, doctor, durable, generate, kafka, model, offsets, serve, stream, tail, topics
from service.cli.output import err
from service.errors import RequestError, SetupError

app = typer.Typer(
    name="sluice",
    help="LLM inference that is native to Kafka and gRPC.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("serve")(serve.serve)
app.command("generate")(generate.generate)
app.command("publish")(kafka.publish)
app.command("tail")(tail.tail)
app.command("stream")(stream.stream)
app.command("submit")(durable.submit)
app.command("attach")(durable.attach)
app.command("get")(durable.get)
app.command("cancel")(durable.cancel)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.add_typer(model.app, name="model")
app.add_typer(topics.app, name="topics")
app.add_typer(offsets.app, name="offsets")
app.add_typer(dlq.app, name="dlq")
app.add_typer(config.app, name="config")


def main() -> None:
    """The console script. Never shows a traceback for what a user can cause."""
    try:
        app()
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
