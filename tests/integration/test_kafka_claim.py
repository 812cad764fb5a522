"""How a new owner's first progress meets an earlier owner that wakes late, on a real broker."""

import pytest
from aiokafka import TopicPartition as ClientPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from aiokafka.structs import OffsetAndMetadata

from service.kafka.clients import Clients
from service.kafka.committer import Committer
from service.kafka.delivery import transactional_id
from service.kafka.ownership import OwnedPartition
from service.kafka.records import TopicPartition
from service.kafka.transactional import TransactionalCommitter
from service.kafka.transactions import Transactions
from service.telemetry.metrics import Metrics
from tests.integration.kafka_harness import Broker
from tests.service.kafka.fakes import FakeOutput, NoOffsets

pytestmark = pytest.mark.kafka


class Member:
    """A group that counts this replica among its members."""

    async def progress(self, partition: TopicPartition) -> OffsetAndMetadata:
        raise NotImplementedError

    async def in_good_standing(self) -> bool:
        return True

    def retire(self, owned: OwnedPartition) -> None:
        raise NotImplementedError

    def reopen(self, partition: TopicPartition) -> None:
        raise NotImplementedError


async def test_a_claim_does_not_overwrite_what_an_earlier_owner_committed_after_it_was_read(topics_of_its_own: Broker) -> None:
    section, partition = topics_of_its_own.section(), TopicPartition(topics_of_its_own.topics.prompts, 0)
    clients = Clients(section, lambda: {"bootstrap_servers": section.bootstrap_servers})

    def transactions(_: TopicPartition) -> Transactions:
        return Transactions(lambda: clients.transactional(transactional_id(section, partition)), group_id=section.group_id)

    unused = Committer(FakeOutput(), NoOffsets(), interval_s=0.05)
    new_owner = TransactionalCommitter(
        transactions, Member(), without_progress=unused, interval_s=0.05, metrics=Metrics().kafka
    )
    halted = transactions(partition)
    await new_owner.fence(partition)
    # The new owner reads the progress here; the earlier one was halted on its way to this fence.
    await halted.fence()
    await halted.commit(partition, (), (5, "the earlier owner's"))
    with pytest.raises(KafkaError):
        await new_owner.claim(partition, (3, "read before"))
    await halted.close()
    admin = AIOKafkaAdminClient(bootstrap_servers=topics_of_its_own.bootstrap)
    await admin.start()
    try:
        found = await admin.list_consumer_group_offsets(section.group_id, partitions=[ClientPartition(*partition)])
    finally:
        await admin.close()
    assert found[ClientPartition(*partition)] == OffsetAndMetadata(5, "the earlier owner's")
