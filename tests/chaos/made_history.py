"""Hand-made histories: a good one of a few prompts, and the parts to spoil it with."""

import base64
from typing import Any

from tests.chaos.history import Acknowledged, Barrier, Committed, History, Seen
from tests.chaos.prompts import expected_tokens

PROMPT = (5, 6, 7)
NUM_TOKENS = 6
TOPIC = "sluice.prompts"


def name_of(offset: int) -> str:
    """The request id of the prompt at this offset of partition 0."""
    return f"{TOPIC}-0-{offset}"


def tokens(offset: int) -> tuple[int, ...]:
    """The right answer to the prompt at this offset."""
    return expected_tokens(PROMPT, offset, 0, NUM_TOKENS)


def text(said: tuple[int, ...]) -> str:
    """Some text of these tokens."""
    return "".join(chr(token) for token in said)


def asked(offset: int, **changes: Any) -> Acknowledged:
    """A prompt; good unless told otherwise."""
    values: dict[str, Any] = {"kind": "tokens", "num_tokens": NUM_TOKENS, "answers": (tokens(offset),)}
    return Acknowledged(partition=0, offset=offset, **(values | changes))


def bad(offset: int) -> Acknowledged:
    """A prompt that must fail."""
    return asked(offset, kind="bad-json", num_tokens=0, answers=(), error="invalid_json")


def record(topic: str, at: int, offset: int, value: dict[str, Any] | None, *, view: str = "committed", kind: str = "") -> Seen:
    """A record about the prompt at `offset`, at the place `at` of the topic's partition 0."""
    return Seen(
        view=view,  # type: ignore[arg-type]
        topic=topic,
        partition=0,
        offset=at,
        timestamp_ms=0,
        key=name_of(offset),
        type=kind,
        value=None if value is None else {"request_id": name_of(offset), **value},
    )


def result(at: int, offset: int, *, said: tuple[int, ...] | None = None, code: str = "", view: str = "committed") -> Seen:
    """A terminal record."""
    if code:
        return record("results", at, offset, {"status": "failed", "error": {"code": code}}, view=view)
    said = tokens(offset) if said is None else said
    choice = {"index": 0, "token_ids": list(said), "text": text(said)}
    return record("results", at, offset, {"status": "finished", "choices": [choice]}, view=view)


def letter(at: int, offset: int, view: str = "committed") -> Seen:
    """A dead letter."""
    return record("dlq", at, offset, {"error": {"code": "invalid_json"}}, view=view)


def started(at: int, offset: int, *, epoch: int = 1, attempt: int = 1, resume_from: int = 0) -> Seen:
    """Opens an attempt on the chunk topic; numbers of 64 bits are text in JSON."""
    value = {"epoch": epoch, "attempt": attempt, "resume_from": [str(resume_from)]}
    return record("chunks", at, offset, value, view="uncommitted", kind="started")


def chunk(at: int, offset: int, first: int, last: int, *, epoch: int = 1, attempt: int = 1) -> Seen:
    """Tokens [first, last) of the right answer."""
    said = tokens(offset)[first:last]
    value = {
        "epoch": epoch,
        "attempt": attempt,
        "seq": str(first),
        "token_ids": list(said),
        "text": text(said),
        "text_offset": str(first),
    }
    return record("chunks", at, offset, value, view="uncommitted", kind="chunk")


def stream(at: int, offset: int) -> list[Seen]:
    """A whole answer in two chunks."""
    return [started(at, offset), chunk(at + 1, offset, 0, 1), chunk(at + 2, offset, 1, NUM_TOKENS)]


def commit(position: int, offset: int, bits: int = 0, *, epoch: int = 1, partition: int = 0) -> Committed:
    """A commit of partition 0."""
    words = ["sluice1", f"e={epoch}"]
    if bits:
        raw = bits.to_bytes((bits.bit_length() + 7) // 8, "little")
        words.append("b=" + base64.b64encode(raw).decode().rstrip("="))
    return Committed(position=position, partition=partition, offset=offset, metadata=" ".join(words), timestamp_ms=0)


def barrier(offset: int, *, results_end: int, letters: int = 0, bits: int = 0, name: str = "b") -> Barrier:
    """A barrier of partition 0."""
    metadata = commit(0, offset, bits).metadata
    return Barrier(name=name, partition=0, offset=offset, metadata=metadata, results_end=results_end, dlq_ends={"0": letters})


def shown(*committed: Seen) -> list[Seen]:
    """What all three readers saw."""
    views = ("committed", "uncommitted", "concurrent")
    return [
        Seen(
            view=view,  # type: ignore[arg-type]
            topic=one.topic,
            partition=one.partition,
            offset=one.offset,
            timestamp_ms=one.timestamp_ms,
            key=one.key,
            type=one.type,
            value=one.value,
        )
        for one in committed
        for view in views
    ]


def good() -> History:
    """Two answers, a refusal with its dead letter, a tombstone; done out of order, over two owners."""
    return History(
        acknowledged=[asked(0), asked(1), bad(2), asked(3, kind="tombstone", num_tokens=0, answers=())],
        seen=[
            *shown(result(0, 1), result(1, 2, code="invalid_json"), letter(0, 2), result(5, 0)),
            *stream(0, 0)[:2],
            *stream(3, 1),
            started(6, 0, epoch=2, attempt=2, resume_from=1),
            chunk(7, 0, 1, NUM_TOKENS, epoch=2, attempt=2),
        ],
        committed=[commit(0, 0, 0b10), commit(1, 0, 0b110), commit(2, 0, 0b1110, epoch=2), commit(3, 4, epoch=2)],
        barriers=[
            barrier(0, results_end=2, letters=1, bits=0b1110, name="middle"),
            barrier(4, results_end=6, letters=1, name="end"),
        ],
        prompts_topic=TOPIC,
    )
