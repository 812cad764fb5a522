"""What a person or a program reads from a command: results on standard output, everything else on standard error.

`--json` gives one JSON object (or one a line for streams) and nothing else on standard output.
"""

import json
import sys
from typing import Any

from rich.console import Console

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One line of JSON on standard output, at once."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def write(text: str) -> None:
    """Model output: as it is, without markup, at once. Terminal control characters are made visible, not obeyed."""
    sys.stdout.write("".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text))
    sys.stdout.flush()
