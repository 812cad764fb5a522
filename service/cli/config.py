"""`sluice config show|check`: what is set, and whether it is valid."""

import json
import textwrap
from typing import Any

import typer

from service.cli import output
from service.cli.options import ConfigFile, Json, Overrides, settings_from
from service.config import Section, Settings

app = typer.Typer(no_args_is_help=True, help="Show or check the configuration.")


@app.command()
def show(config: ConfigFile = None, overrides: Overrides = None, as_json: Json = False) -> None:
    """Every setting with its value and meaning, as a TOML file that can be edited and used."""
    settings = settings_from(config, overrides)
    if as_json:
        output.print_json(settings.model_dump(mode="json"))
    else:
        typer.echo(render_toml(settings), nl=False)


@app.command()
def check(config: ConfigFile = None, overrides: Overrides = None, as_json: Json = False) -> None:
    """Exit 0 when the configuration is valid; 2, and every key at fault, when it is not."""
    settings_from(config, overrides)
    if as_json:
        output.print_json({"valid": True})
    else:
        output.out.print("The configuration is valid.")


def render_toml(settings: Settings) -> str:
    """The settings as TOML, each section and field explained by its docstring."""
    lines = [
        "# Every setting of Sluice with its default. Environment variables override this file (SLUICE_GRPC__PORT=50052),",
        "# flags override both (--set grpc.port=50052). Made by `sluice config show`.",
    ]
    for name in type(settings).model_fields:
        section: Section = getattr(settings, name)
        shown = section.model_dump(mode="json")
        lines += ["", *_comment(type(section).__doc__ or ""), f"[{name}]"]
        for field_name, field in type(section).model_fields.items():
            lines += [*_comment(field.description or ""), f"{field_name} = {_toml(shown[field_name])}"]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), 118)]


def _toml(value: Any) -> str:
    # JSON's strings, numbers, booleans and lists are TOML's too; the settings hold nothing else. Secrets come as asterisks.
    return json.dumps(value, ensure_ascii=False)
