"""A terminal record as a person or a program reads it: shared by publish, tail and get."""

import json
from typing import Any

from google.protobuf.message import Message
from rich.markup import escape

from service import wire
from service.cli import output


def as_document(message: Message) -> dict[str, Any]:
    """The message in its JSON mapping."""
    document: dict[str, Any] = json.loads(wire.to_bytes(message))
    return document


def show_result(value: dict[str, Any], as_json: bool) -> None:
    """One result, in its JSON mapping."""
    if as_json:
        output.print_json(value)
        return
    request_id, status = escape(str(value.get("request_id", ""))), value.get("status")
    if status == "pending":
        output.out.print(f"[bold yellow]{request_id}[/] has not ended yet; `sluice attach {request_id}` follows it")
        return
    if value.get("unreadable"):
        output.out.print(f"[bold red]{request_id}[/] unreadable")
        return
    error = value.get("error") or {}
    output.out.print(f"[bold {'red' if error else 'green'}]{request_id}[/]", end=" ")
    if error:
        where = f"{error['field']}: " if error.get("field") else ""
        output.out.print(escape(f"{error.get('code')}: {where}{error.get('message')}"))
    else:
        usage, timings = value.get("usage", {}), value.get("timings", {})
        output.out.print(
            f"[dim]{usage.get('prompt_tokens')} prompt ({usage.get('cached_prompt_tokens')} cached), "
            f"{usage.get('completion_tokens')} tokens, TTFT {timings.get('ttft_ms', 0):.0f} ms, {timings.get('total_ms', 0):.0f} ms[/]"
        )
    for choice in value.get("choices", []):
        if choice.get("text"):
            output.write(choice["text"] + "\n")
