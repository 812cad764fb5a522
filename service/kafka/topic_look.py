"""One look at every topic of a cluster, with the identity that the broker gave each: a topic that was deleted and made anew has its old
name and another identity.

The client library asks with an older request that tells no identities (aiokafka 0.14, pinned); this file has the newer one
(KIP-516; https://kafka.apache.org/protocol.html#The_Messages_Metadata, version 12, Kafka 2.8 and later). A broker that does not
know it is looked at without: identities are then "", which no one may take for equal or different.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import IncompatibleBrokerVersion
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    AbstractType,
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Schema,
    TaggedFields,
)

_ID_BYTES = 16
_NO_ID = bytes(_ID_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicLook:
    """One topic. `topic_id`: 32 hexadecimal digits, "" when not known. `led`: each of its partitions has a leader."""

    topic_id: str
    num_partitions: int
    led: bool


async def look(admin: AIOKafkaAdminClient) -> Mapping[str, TopicLook]:
    """Every topic that may be seen. Raises `KafkaError`.

    All topics, never one by name: a broker that creates topics by itself would make the one that is asked for.
    """
    try:
        answer = await admin._send_request(_Metadata())
    except (IncompatibleBrokerVersion, NotImplementedError):
        return {found["topic"]: _looked_at(found) for found in await admin.describe_topics()}
    return {found["topic"]: _looked_at(found) for found in answer.to_object()["topics"]}


def _looked_at(found: dict[str, Any]) -> TopicLook:
    partitions = found["partitions"]
    led = found["error_code"] == 0 and bool(partitions) and all(partition["leader"] >= 0 for partition in partitions)
    return TopicLook(topic_id=found.get("topic_id", ""), num_partitions=len(partitions), led=led)


class _Id(AbstractType[str]):
    """A UUID."""

    @classmethod
    def encode(cls, value: str) -> bytes:
        return bytes.fromhex(value) if value else _NO_ID

    @classmethod
    def decode(cls, data: BytesIO) -> str:
        raw = data.read(_ID_BYTES)
        if len(raw) != _ID_BYTES:
            raise ValueError("the answer ends inside an identity")
        return "" if raw == _NO_ID else raw.hex()


class _MetadataResponse(Response):
    API_KEY = 3
    API_VERSION = 12
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString("utf-8")),
                ("port", Int32),
                ("rack", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString("utf-8")),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("topic", CompactString("utf-8")),
                ("topic_id", _Id),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("isr", CompactArray(Int32)),
                        ("offline_replicas", CompactArray(Int32)),
                        ("tags", TaggedFields),
                    ),
                ),
                ("authorized_operations", Int32),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _MetadataRequest(RequestStruct):
    API_KEY = 3
    API_VERSION = 12
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _MetadataResponse
    SCHEMA = Schema(
        (
            "topics",
            CompactArray(("topic_id", _Id), ("topic", CompactString("utf-8")), ("tags", TaggedFields)),
        ),
        ("allow_auto_topic_creation", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


class _Metadata(Request[_MetadataRequest]):
    API_KEY = 3

    def build(self, request_struct_class: type[_MetadataRequest]) -> _MetadataRequest:
        return request_struct_class(None, False, False, {})
