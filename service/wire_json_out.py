"""Messages as JSON: protobuf's canonical mapping in snake_case, with fields that have no presence always there.

Guarantee: the value that `json_format.MessageToDict(…, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)`
gives for any message of `schemas/`, at a tenth of its cost: descriptors are read once a type, not once a message, and a chunk record is
written every few tokens. A test holds the equality for every message.
"""

import base64
import math
import operator
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import msgspec
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

Convert = Callable[[Any], Any]

_TEXT = (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)
_AS_IT_IS = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_BOOL)


def message_to_json(message: Message) -> bytes:
    """UTF-8, on one line."""
    return msgspec.json.encode(_as_dict(message))


def _as_dict(message: Message) -> dict[str, Any]:
    get, fields = _plan(message.DESCRIPTOR)
    found = {}
    for (name, has_presence, convert), value in zip(fields, get(message), strict=True):
        if not has_presence or message.HasField(name):
            found[name] = value if convert is None else convert(value)
    return found


@lru_cache(maxsize=256)
def _plan(descriptor: Descriptor) -> tuple[Callable[[Message], Sequence[Any]], tuple[tuple[str, bool, Convert | None], ...]]:
    """How a message's values are got, all at once, and what becomes of each (None: nothing)."""
    names = [field.name for field in descriptor.fields]
    # Of a single name it would give the value itself.
    get = operator.attrgetter(*names) if len(names) > 1 else lambda message: [getattr(message, name) for name in names]
    return get, tuple((field.name, field.has_presence, _converter(field)) for field in descriptor.fields)


def _converter(field: FieldDescriptor) -> Convert | None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return _map(_single(field.message_type.fields_by_name["value"]))
    single = _single(field)
    if not field.is_repeated:
        return single
    return list if single is None else lambda values: [single(value) for value in values]


def _map(convert: Convert | None) -> Convert:
    return lambda found: {str(key): found[key] if convert is None else convert(found[key]) for key in found}


def _single(field: FieldDescriptor) -> Convert | None:
    """Of one value of a field; None where it stays as it is. Raises `TypeError` for kinds that no message of ours has."""
    if field.cpp_type in _AS_IT_IS:
        return None
    if field.cpp_type in _TEXT:
        return str
    if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
        return _number
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return _base64 if field.type == FieldDescriptor.TYPE_BYTES else None
    if field.enum_type is not None:
        names = {value.number: value.name for value in field.enum_type.values}
        return lambda number: names.get(number, number)
    if field.message_type is not None:
        if field.message_type.full_name == "google.protobuf.Timestamp":
            return _instant
        if not field.message_type.full_name.startswith("google."):
            return _as_dict
    raise TypeError(f"{field.full_name}: no rule for this kind of field")


def _instant(stamp: Timestamp) -> str:
    nanos = stamp.nanos
    if nanos % 1_000:
        fraction = f".{nanos:09}"
    elif nanos % 1_000_000:
        fraction = f".{nanos // 1_000:06}"
    else:
        fraction = f".{nanos // 1_000_000:03}" if nanos else ""
    return f"{_second(stamp.seconds)}{fraction}Z"


@lru_cache(maxsize=64)
def _second(seconds: int) -> str:
    # Many records are written within one second.
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
