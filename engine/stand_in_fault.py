"""Faults that the stand-in engine commits when asked, and only then: `SLUICE_STAND_IN_FAULT` in its environment.

    exit@N      the process ends with exit code 41 in its N-th step
    hang@N      the N-th step never returns
    raise@N     the N-th step raises
    garbage@N   the N-th output on the socket is no frame
    poison@T    the process ends with exit code 41 as soon as it is given a prompt that holds token T

Read once, at the start of the child.
"""

import os
import signal
from dataclasses import dataclass
from typing import Literal, NoReturn, cast

from engine.errors import ConfigError

VARIABLE = "SLUICE_STAND_IN_FAULT"
EXIT_CODE = 41
GARBAGE = b"\xff" * 64
"""Claims a frame of 4 GiB: refused at the length."""

FaultKind = Literal["exit", "hang", "raise", "garbage", "poison"]
_KINDS = ("exit", "hang", "raise", "garbage", "poison")


def _hang() -> NoReturn:
    while True:
        signal.pause()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault and the step, or token, that sets it off."""

    kind: FaultKind
    at: int

    @classmethod
    def parse(cls, text: str) -> "Fault | None":
        """`kind@number`; None for an empty text. Raises `ConfigError`."""
        if not text:
            return None
        kind, _, number = text.partition("@")
        if kind not in _KINDS or not number.isdecimal():
            raise ConfigError(f"{VARIABLE} must be {'|'.join(_KINDS)}@number", field=VARIABLE)
        return cls(kind=cast(FaultKind, kind), at=int(number))

    def on_step(self, step: int) -> None:
        """Misbehaves if this is the step."""
        if step != self.at:
            return
        if self.kind == "exit":
            os._exit(EXIT_CODE)
        if self.kind == "hang":
            _hang()
        if self.kind == "raise":
            raise RuntimeError("the stand-in was told to raise")

    def on_prompt(self, token_ids: tuple[int, ...]) -> None:
        """Ends the process if the prompt is the poison."""
        if self.kind == "poison" and self.at in token_ids:
            os._exit(EXIT_CODE)

    def spoils(self, step: int) -> bool:
        """Whether this step's output is to be garbage."""
        return self.kind == "garbage" and step == self.at
