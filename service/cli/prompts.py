"""The prompt of a command line: its options, and the `PromptRequest` that they make. Shared by generate, stream and publish."""

import sys
from dataclasses import dataclass
from typing import Annotated

import typer

from service import wire_limits
from service.cli.options import utf8
from service.contract import PromptRequest, SamplingFields
from service.errors import SetupError

Text = Annotated[str, typer.Argument(metavar="TEXT", help="The prompt; - reads standard input.")]
Raw = Annotated[bool, typer.Option("--raw", help="Take the text as it is, without the model's chat template.")]
System = Annotated[str, typer.Option("--system", help="A system message before the text.", show_default=False)]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Most tokens to say.", show_default=False)]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, max=2.0, help="0 is greedy.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Nucleus sampling.", show_default=False)]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Same seed, same draws.", show_default=False)]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End before this string; may be repeated.", show_default=False)]
ClassName = Annotated[
    str,
    typer.Option(
        "--class", callback=utf8, help="interactive, standard or batch: whose turn it is when many wait.", show_default=False
    ),
]
Label = Annotated[str, typer.Option("--label", help="Your own id; it comes back unchanged.", show_default=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """How a prompt that a command sends away is asked."""

    raw: Raw = False
    system: System = ""
    max_tokens: MaxTokens = None
    temperature: Temperature = 0.0
    top_p: TopP = None
    seed: Seed = None
    stop: Stop = None
    label: Label = ""

    def request(self, text: str, *, model: str = "") -> PromptRequest:
        """As `prompt_request`."""
        return prompt_request(
            text, raw=self.raw, system=self.system, max_tokens=self.max_tokens, temperature=self.temperature,
            top_p=self.top_p, seed=self.seed, stop=self.stop, label=self.label, model=model,
        )  # fmt: skip


def _standard_input() -> str:
    """All of it, whatever the locale: prompts are UTF-8. Raises `SetupError`."""
    raw = sys.stdin.buffer.read()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SetupError(f"standard input is no valid UTF-8 at byte {error.start}: a prompt is text") from None


def prompt_request(
    text: str,
    *,
    raw: bool = False,
    system: str = "",
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: int | None = None,
    stop: list[str] | None = None,
    label: str = "",
    model: str = "",
) -> PromptRequest:
    """A checked prompt. Raises `RequestError` that names the field, `SetupError` for options that exclude each other."""
    if text == "-":
        text = _standard_input()
    if not text.strip():
        raise SetupError("the prompt is empty: give TEXT, or - to read standard input")
    if raw and system:
        raise SetupError("--system needs the chat template: leave --raw away")
    messages = None if raw else ((("system", system),) if system else ()) + (("user", text),)
    return wire_limits.check(
        PromptRequest(
            text=text if raw else None,
            messages=messages,
            model=model,
            label=label,
            sampling=SamplingFields(
                max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=tuple(stop or ())
            ),
        )
    )
