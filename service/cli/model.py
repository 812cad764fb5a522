"""`sluice model import`: a GGUF file becomes a Hugging Face directory that Sluice serves."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

import engine
from service.cli import output
from service.cli.options import Json

app = typer.Typer(no_args_is_help=True, help="Bring a model into the form that Sluice serves.")


@app.callback()
def _group() -> None:
    """Keeps `import` a subcommand while it is the only one."""


@app.command("import")
def import_model(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A Llama-family GGUF file.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the model goes; must not exist yet.")],
    as_json: Json = False,
) -> None:
    """Read a GGUF file once and write safetensors (bf16), tokenizer and chat template."""
    with output.progress("importing") as tell:
        engine.import_gguf(file, directory, tell)
    if as_json:
        output.print_json({"directory": str(directory)})
    else:
        output.out.print(f"Imported into [bold]{escape(str(directory))}[/]. Try it:")
        output.out.print(f'  sluice generate "What is the capital of France?" --set model.path={escape(str(directory))}')
