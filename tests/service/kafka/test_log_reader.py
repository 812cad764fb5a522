"""Questions to Kafka that cannot be answered at once: asked again, and given up with a code."""

from types import SimpleNamespace

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import GroupCoordinatorNotAvailableError, KafkaError, TopicAuthorizationFailedError

from service.errors import RequestError
from service.kafka import log_reader
from service.kafka.log_reader import LogReader
from service.kafka.tracker import PartitionTracker

AT = TopicPartition("t.prompts", 0)


class FakeAdmin:
    """Answers what it is given, in turn."""

    def __init__(self, *answers: dict[TopicPartition, object] | KafkaError) -> None:
        self._answers = list(answers)
        self.closed = 0

    async def start(self) -> None: ...

    async def close(self) -> None:
        self.closed += 1

    async def list_consumer_group_offsets(
        self, group_id: str, partitions: list[TopicPartition]
    ) -> dict[TopicPartition, object]:
        answer = self._answers.pop(0)
        if isinstance(answer, KafkaError):
            raise answer
        return answer


def reader(admin: FakeAdmin) -> LogReader:
    return LogReader(make_consumer=lambda: pytest.fail("no reader is needed"), make_admin=lambda: admin, group_id="g")  # type: ignore[arg-type, return-value]


async def test_progress_waits_for_a_coordinator_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_reader, "_RETRY_S", 0.0)
    low, metadata = PartitionTracker(low=7, epoch=3).commit_point()
    admin = FakeAdmin(GroupCoordinatorNotAvailableError(), {}, {AT: SimpleNamespace(offset=low, metadata=metadata)})
    found, progress = await reader(admin).progress(log_reader.TopicPartition(*AT))
    assert (found, progress.epoch, admin.closed) == (7, 3, 0)


async def test_what_kafka_refuses_is_a_code_and_ends_the_client() -> None:
    admin = FakeAdmin(TopicAuthorizationFailedError())
    with pytest.raises(RequestError) as caught:
        await reader(admin).progress(log_reader.TopicPartition(*AT))
    assert (caught.value.code, admin.closed) == ("broker_unavailable", 1)
