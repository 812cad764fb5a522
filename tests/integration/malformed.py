"""Malformed prompt records of every class, made from a seed: what each is, and how it must end.

Classes follow reliability's row F for Kafka: bytes that are no JSON or protobuf, JSON of the wrong shape, unknown and duplicate keys,
wrong types, numbers out of range or not finite, text that is no Unicode, oversize and empty values, headers of every kind, prompts
that can never fit. Each draw changes the bytes, so that no two thousand are the same.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from schemas.v1 import inference_pb2

JSON, PROTOBUF = b"application/json", b"application/x-protobuf"
_WORDS = ("river", "königin", "漢字", "🙂", "a\u0301", "\u202e", "{{", "<|im_end|>", "%s", "\x00")


@dataclass(frozen=True, slots=True, kw_only=True)
class Malformed:
    """A record and its end: the code, and what the error must name ("" when there is nothing to name)."""

    kind: str
    value: bytes
    code: str
    names: str = ""
    headers: dict[str, bytes] = field(default_factory=dict)


def records(seed: int, *, context: int) -> Iterator[Malformed]:
    """Without end, every kind in turn in an order drawn anew each round. `context`: tokens that the replica has for one request."""
    draw = Random(seed)
    kinds: dict[str, Callable[[Random, int], Malformed]] = {
        name.removeprefix("_make_"): make for name, make in globals().items() if name.startswith("_make_")
    }
    while True:
        for kind in draw.sample(sorted(kinds), len(kinds)):
            yield kinds[kind](draw, context)


def _text(draw: Random) -> str:
    return " ".join(draw.choice(_WORDS) for _ in range(draw.randint(1, 4)))


def _good(draw: Random) -> dict[str, Any]:
    return {"prompt": _text(draw), "sampling": {"max_tokens": draw.randint(1, 4)}}


def _bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def _sampling(kind: str, name: str, value: Any, draw: Random, code: str = "invalid_field") -> Malformed:
    return Malformed(
        kind=kind, value=_bytes({"prompt": _text(draw), "sampling": {name: value}}), code=code, names=f"sampling.{name}"
    )


def _make_noise(draw: Random, context: int) -> Malformed:
    return Malformed(kind="noise", value=b"\x80" + draw.randbytes(draw.randint(1, 400)), code="invalid_json")


def _make_cut_off(draw: Random, context: int) -> Malformed:
    whole = _bytes(_good(draw))
    return Malformed(kind="cut off", value=whole[: draw.randint(1, len(whole) - 1)], code="invalid_json")


def _make_trailing(draw: Random, context: int) -> Malformed:
    return Malformed(
        kind="trailing", value=_bytes(_good(draw)) + draw.choice([b"}", b" {}", b",", b"\x00"]), code="invalid_json"
    )


def _make_no_object(draw: Random, context: int) -> Malformed:
    value = draw.choice([[1], "text", 7, True, None, [_good(draw)]])
    return Malformed(kind="no object", value=_bytes(value), code="invalid_json")


def _make_empty(draw: Random, context: int) -> Malformed:
    return Malformed(kind="empty", value=b" " * draw.randint(0, 9), code="invalid_json")


def _make_deep(draw: Random, context: int) -> Malformed:
    opening = draw.choice([b"[", b'{"a":'])
    return Malformed(kind="deep", value=b'{"prompt": ' + opening * draw.randint(2_000, 20_000), code="invalid_json")


def _make_broken_utf8(draw: Random, context: int) -> Malformed:
    broken = draw.choice([b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82"])
    return Malformed(kind="broken UTF-8", value=b'{"prompt": "a' + broken + b'"}', code="invalid_json")


def _make_surrogate(draw: Random, context: int) -> Malformed:
    lone = f"\\ud{draw.choice('89ab')}{draw.randrange(256):02x}"
    value = f'{{"prompt": "{lone}"}}'.encode()
    return Malformed(kind="surrogate", value=value, code="invalid_field", names="prompt")


def _make_duplicate_key(draw: Random, context: int) -> Malformed:
    key = draw.choice(["prompt", "label", "ttl_ms"])
    value = f'{{"prompt": "a", "{key}": 1, "{key}": 1}}'.encode()
    return Malformed(kind="duplicate key", value=value, code="invalid_json", names=key)


def _make_unknown_key(draw: Random, context: int) -> Malformed:
    name = f"x{draw.randrange(10**6)}"
    return Malformed(kind="unknown key", value=_bytes({**_good(draw), name: 1}), code="unknown_field", names=name)


def _make_unknown_sampling_key(draw: Random, context: int) -> Malformed:
    name = f"x{draw.randrange(10**6)}"
    return _sampling("unknown sampling key", name, 1, draw, code="unknown_field")


def _make_wrong_type(draw: Random, context: int) -> Malformed:
    name, value = draw.choice(
        [
            ("prompt", 7),
            ("prompt", ["a"]),
            ("label", 1.5),
            ("ttl_ms", "soon"),
            ("sampling", []),
            ("sampling", "x"),
            ("model", {}),
        ]
    )
    return Malformed(kind="wrong type", value=_bytes({**_good(draw), name: value}), code="invalid_field", names=name)


def _make_wrong_count(draw: Random, context: int) -> Malformed:
    name = draw.choice(["max_tokens", "n"])
    return _sampling("wrong count", name, draw.choice([0, -1, -(10**9), 1.5, "many", 2**32, 10**40]), draw)


def _make_out_of_range(draw: Random, context: int) -> Malformed:
    name, value = draw.choice(
        [("top_p", 1.0 + draw.uniform(0.01, 9)), ("top_p", -draw.random() - 0.01), ("temperature", -1 - draw.random()), ("min_p", 2),
         ("repetition_penalty", -1), ("presence_penalty", 9), ("frequency_penalty", -9)]
    )  # fmt: skip
    return _sampling("out of range", name, value, draw)


def _make_not_finite(draw: Random, context: int) -> Malformed:
    name = draw.choice(["top_p", "temperature", "min_p"])
    word = draw.choice(["NaN", "Infinity", "-Infinity", "1e999", '"NaN"'])
    value = f'{{"prompt": "a", "sampling": {{"{name}": {word}}}}}'.encode()
    return Malformed(kind="not finite", value=value, code="invalid_field", names=f"sampling.{name}")


def _make_many_digits(draw: Random, context: int) -> Malformed:
    digits = str(draw.randint(1, 9)) * draw.randint(4_400, 9_000)
    value = f'{{"prompt": "a", "sampling": {{"seed": {digits}}}}}'.encode()
    return Malformed(kind="many digits", value=value, code="invalid_field", names="sampling.seed")


def _make_no_prompt(draw: Random, context: int) -> Malformed:
    value = draw.choice([{}, {"label": "a"}, {"prompt": ""}])
    return Malformed(kind="no prompt", value=_bytes(value), code="invalid_field", names="prompt")


def _make_two_inputs(draw: Random, context: int) -> Malformed:
    value = _bytes({**_good(draw), "token_ids": {"ids": [1]} if draw.random() < 0.5 else [1]})
    return Malformed(kind="two inputs", value=value, code="invalid_field", names="token_ids")


def _make_foreign_token(draw: Random, context: int) -> Malformed:
    value = _bytes({"token_ids": [3, draw.randint(100_000, 2**31)]})
    return Malformed(kind="foreign token", value=value, code="invalid_field", names="token_ids")


def _make_too_long(draw: Random, context: int) -> Malformed:
    value = _bytes({"prompt": "x" * draw.randint(context + 1, 4 * context)})
    return Malformed(kind="too long", value=value, code="prompt_too_long", names="prompt")


def _make_can_never_fit(draw: Random, context: int) -> Malformed:
    return _sampling("can never fit", "max_tokens", context + draw.randint(0, 10**6), draw, code="too_many_tokens")


def _make_unknown_model(draw: Random, context: int) -> Malformed:
    value = _bytes({**_good(draw), "model": f"gpt-{draw.randrange(10**6)}"})
    return Malformed(kind="unknown model", value=value, code="unknown_model", names="model")


def _make_content_type(draw: Random, context: int) -> Malformed:
    kind = draw.choice([b"text/plain", b"application/cloudevents+json", b"application/xml", b"json", b"*/*"])
    return Malformed(
        kind="content type", value=_bytes(_good(draw)), code="unsupported_content_type", names="content-type",
        headers={"content-type": kind},
    )  # fmt: skip


def _make_header_text(draw: Random, context: int) -> Malformed:
    name = draw.choice(["sluice-label", "sluice-conversation-id", "sluice-deadline", "sluice-ttl-ms"])
    value = draw.choice([b"\xff\xfe", b"x" * draw.randint(1_100, 3_000)])
    return Malformed(kind="header text", value=_bytes(_good(draw)), code="invalid_field", names=name, headers={name: value})


def _make_header_time(draw: Random, context: int) -> Malformed:
    name, value = draw.choice(
        [("sluice-deadline", b"tomorrow"), ("sluice-deadline", b"2030-01-01T00:00:00"), ("sluice-deadline", b"1950-01-01T00:00:00Z"),
         ("sluice-ttl-ms", b"-5"), ("sluice-ttl-ms", b"0"), ("sluice-ttl-ms", b"1e3"), ("sluice-ttl-ms", b"99999999999")]
    )  # fmt: skip
    return Malformed(kind="header time", value=_bytes(_good(draw)), code="invalid_field", names=name, headers={name: value})


def _make_reply_topic(draw: Random, context: int) -> Malformed:
    headers = {"sluice-reply-to": f"elsewhere-{draw.randrange(99)}".encode()}
    return Malformed(
        kind="reply topic", value=_bytes(_good(draw)), code="reply_to_refused", names="sluice-reply-to", headers=headers
    )


def _make_cloud_event_version(draw: Random, context: int) -> Malformed:
    headers = {"ce_id": b"1", "ce_specversion": draw.choice([b"0.3", b"2.0", b"one"])}
    return Malformed(
        kind="event version", value=_bytes(_good(draw)), code="invalid_field", names="ce_specversion", headers=headers
    )


def _make_protobuf_noise(draw: Random, context: int) -> Malformed:
    # Field number 0 does not exist.
    value = b"\x00" + draw.randbytes(draw.randint(1, 300))
    return Malformed(kind="protobuf noise", value=value, code="invalid_protobuf", headers={"content-type": PROTOBUF})


def _make_protobuf_field(draw: Random, context: int) -> Malformed:
    number = draw.choice([float("nan"), float("inf"), -1.0, 7.5])
    value = inference_pb2.Prompt(prompt="a", sampling=inference_pb2.Sampling(top_p=number)).SerializeToString()
    return Malformed(
        kind="protobuf field", value=value, code="invalid_field", names="sampling.top_p", headers={"content-type": PROTOBUF}
    )
