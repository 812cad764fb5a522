"""Options that several commands share, each list of them written once, and how they become `Settings`."""

import dataclasses
import functools
import inspect
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from service.config import Settings, load
from service.errors import SetupError
from service.wire_limits import check_text


def utf8(parameter: typer.CallbackParam, value: str) -> str:
    """The callback of a text that goes into a message or a record. Raises `RequestError` that names the option."""
    check_text(parameter.opts[0], value)
    return value


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """What every command takes."""

    config: ConfigFile = None
    overrides: Overrides = None
    as_json: Json = False

    def settings(self, flags: Mapping[str, Mapping[str, Any]] | None = None) -> Settings:
        """As `settings_from`."""
        return settings_from(self.config, self.overrides, flags)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """`command` as Typer takes it: each parameter that is a dataclass stands for the options that are its fields.

    They come after the command's own.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)}
    parameters = [
        parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name not in groups
    ]
    for group in groups.values():
        annotations = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotations[field.name]
            )
            for field in dataclasses.fields(group)
        ]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        command(**values)

    # Typer looks at these two; what `wraps` kept of the command's own would hide them.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


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
