"""Our JSON of a message is protobuf's own."""

import json
import math
import random

import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from schemas.v1 import events_pb2, inference_pb2
from service.wire_json_out import message_to_json

MESSAGES: list[Descriptor] = [
    descriptor
    for file in (events_pb2.DESCRIPTOR, inference_pb2.DESCRIPTOR)
    for descriptor in file.message_types_by_name.values()
]
VALUES = {
    FieldDescriptor.CPPTYPE_INT32: (0, -7, 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 7, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (0, -(2**60), 3),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**63, 3),
    FieldDescriptor.CPPTYPE_DOUBLE: (0.0, -0.25, 1e300, 0.1, math.inf, -math.inf, math.nan),
    FieldDescriptor.CPPTYPE_BOOL: (True, False),
}


def single(field: FieldDescriptor, draw: random.Random):
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return draw.choice([b"", b"\x00\xff\xfe"] if field.type == FieldDescriptor.TYPE_BYTES else ["", 'é"\n\u2028', "plain"])
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return draw.choice([value.number for value in field.enum_type.values])
    return draw.choice(VALUES[field.cpp_type])


def fill(message: Message, draw: random.Random, depth: int = 0) -> None:
    """Sets about half of the fields, also those inside fields."""
    if message.DESCRIPTOR.full_name == "google.protobuf.Timestamp":
        message.seconds, message.nanos = draw.randrange(2**31), draw.choice([0, 5, 120_000_000])
        return
    for field in message.DESCRIPTOR.fields:
        if depth > 3 or draw.random() < 0.5:
            continue
        is_message = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
        value = getattr(message, field.name)
        if is_message and field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            for _ in range(2):
                value[single(entry["key"], draw)] = single(entry["value"], draw)
        elif field.is_repeated:
            for _ in range(draw.randrange(3)):
                if is_message:
                    fill(value.add(), draw, depth + 1)
                else:
                    value.append(single(field, draw))
        elif is_message:
            value.SetInParent()
            fill(value, draw, depth + 1)
        else:
            setattr(message, field.name, single(field, draw))


@pytest.mark.parametrize("descriptor", MESSAGES, ids=lambda descriptor: descriptor.name)
def test_a_message_is_said_as_protobuf_itself_says_it(descriptor: Descriptor) -> None:
    for seed in range(40):
        message = GetMessageClass(descriptor)()
        fill(message, random.Random(seed))
        wanted = json_format.MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        # Compared as what a reader gets: NaN is a string in both.
        assert json.loads(message_to_json(message)) == wanted, f"seed {seed}"
