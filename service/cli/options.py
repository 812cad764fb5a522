"""Options that several commands share, and how they become `Settings`."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from service.config import Settings, load
from service.errors import SetupError

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        envvar="SLUICE_CONFIG",
        help="A TOML file; deploy/sluice.toml lists every setting.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="SECTION.FIELD=VALUE", help="Override one setting; may be repeated.", show_default=False
    ),
]
Quantize = Annotated[
    Literal["int8", "int4"] | None,
    typer.Option(
        "--quantize",
        help="Store the weights in 8 or 4 bits when they are loaded, on a CPU (engine.quantize): faster and smaller, "
        "not quite the same model.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")]


def settings_from(
    config: Path | None, overrides: list[str] | None, flags: Mapping[str, Mapping[str, Any]] | None = None
) -> Settings:
    """File, then environment, then `--set`, then a command's own flags. Raises `SetupError`."""
    merged: dict[str, dict[str, Any]] = {}
    for item in overrides or []:
        path, equals, value = item.partition("=")
        section, dot, field = path.strip().partition(".")
        if not (equals and dot and section and field):
            raise SetupError(f"--set {item}: write it as section.field=value, for example --set grpc.port=50052")
        merged.setdefault(section, {})[field] = _toml_value(value.strip())
    for section, fields in (flags or {}).items():
        merged.setdefault(section, {}).update({name: value for name, value in fields.items() if value is not None})
    return load(config, merged)


def _toml_value(text: str) -> Any:
    """`text` as TOML reads it; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
