"""What the group says of this member: committed progress with its metadata, and whether it is a member still.

The client library hides both: `committed()` drops the metadata, and nothing public tells of a heartbeat's answer (aiokafka 0.14,
pinned; this file alone looks inside its consumer).
"""

import asyncio

from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as ClientPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError, KafkaError
from aiokafka.protocol.group import HeartbeatRequest
from aiokafka.structs import OffsetAndMetadata

from service.kafka.records import TopicPartition

_TIMEOUT_S = 5.0


async def progress(admin: AIOKafkaAdminClient, group_id: str, partition: TopicPartition) -> OffsetAndMetadata:
    """What is committed; offset -1 when nothing was. Raises `KafkaError`, `TimeoutError`."""
    asked = ClientPartition(*partition)
    async with asyncio.timeout(_TIMEOUT_S):
        found = await admin.list_consumer_group_offsets(group_id, partitions=[asked])
    if asked not in found:
        # Asked for by name, a partition without a commit comes back as -1. The client drops the answer's own error (the
        # coordinator moves, or loads): taken for "never committed", it would hand the whole log out again.
        raise GroupCoordinatorNotAvailableError(
            f"the group's progress was not told for {partition.topic}-{partition.partition}"
        )
    return found[asked]


async def in_good_standing(consumer: AIOKafkaConsumer) -> bool:
    """Whether the group answers, now, that this consumer is a member of its present generation."""
    group = consumer._coordinator
    request = HeartbeatRequest(group.group_id, group.generation, group.member_id)
    if group.coordinator_id is None or group.generation < 0:
        return False
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            answer = await group._send_req(request)
    except (KafkaError, TimeoutError):
        return False
    return bool(answer.error_code == 0)
