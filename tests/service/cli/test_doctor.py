"""What `sluice doctor` asks of servers, and that asking changes nothing."""

import socket
from types import SimpleNamespace

import pytest

from service.cli import doctor
from service.config import KafkaSection


class FakeAdmin:
    """librdkafka's admin client of a broker that creates topics by itself: it makes one that is asked for by name."""

    def __init__(self, topics: set[str]) -> None:
        self.topics = topics

    def poll(self, timeout: float) -> int:
        return 0

    def list_topics(self, topic: str | None = None, timeout: float = -1) -> SimpleNamespace:
        if topic is not None:
            self.topics.add(topic)
        asked = self.topics if topic is None else {topic}
        return SimpleNamespace(topics={name: SimpleNamespace(error=None) for name in asked})


async def exactly_once(*_: object) -> SimpleNamespace:
    return SimpleNamespace(mode="exactly_once", reason="")


@pytest.mark.parametrize(("there", "state"), [({"sluice.prompts"}, "note"), ({"sluice.dlq"}, "ok")])
def test_the_doctor_makes_no_topic(there: set[str], state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    admin = FakeAdmin(set(there))
    monkeypatch.setattr(doctor, "AdminClient", lambda arguments: admin)
    monkeypatch.setattr(doctor, "choose", exactly_once)
    found = doctor._delivery(KafkaSection(embedded=False))
    assert (found.state, admin.topics) == (state, there)


def test_the_doctor_looks_for_a_collector_at_an_address_in_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        asked.append(address)
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", connect)
    assert doctor._tracing("http://[::1]:4317").state == "ok"
    assert asked == [("::1", 4317)]
