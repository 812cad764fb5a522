"""Exactly once on a real broker: fencing, transactions that are cut off, records that are refused, and who goes on with what."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiokafka.client
import pytest

from service.config import KafkaSection
from service.kafka import EmbeddedBroker, Topics
from service.kafka.clients import Clients
from service.kafka.delivery import Delivery, choose, probe, transactional_id
from service.kafka.records import OutRecord, TopicPartition
from service.kafka.tracker import decode
from service.kafka.transactions import LostError, RefusedError, Transactions
from service.telemetry.metrics import Metrics
from tests.chaos.proxy import END_TXN, BrokerProxy, Trap
from tests.integration.kafka_harness import Broker, crash, eventually, serving
from tests.integration.test_kafka_faults import committed
from tests.service.kafka.fakes import FakeGeneration

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]


@pytest.fixture
def broker(kafka_server: str) -> Broker:
    return Broker(kafka_server)


def clients_of(section: KafkaSection) -> Clients:
    return Clients(section, lambda: {"bootstrap_servers": section.bootstrap_servers})


def transactions_of(broker: Broker) -> Transactions:
    """Of the first prompt partition; every call gives one that fences the others."""
    section = broker.section()
    name = transactional_id(section, TopicPartition(broker.topics.prompts, 0))
    return Transactions(lambda: clients_of(section).transactional(name), group_id=section.group_id)


def record(broker: Broker, value: bytes) -> OutRecord:
    return OutRecord(topic=broker.topics.results, key=b"k", value=value, partition=0)


@asynccontextmanager
async def proxied(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[BrokerProxy]:
    """Every connection of aiokafka goes through a proxy; the test's own client library goes straight to the broker."""
    proxy, connect = BrokerProxy(), aiokafka.client.create_conn
    proxy.upstream_port = int(broker.bootstrap.rpartition(":")[2])
    await proxy.start()

    async def through(host: str, port: int, **options: Any) -> Any:
        return await connect(host, proxy.port, **options)

    monkeypatch.setattr(aiokafka.client, "create_conn", through)
    try:
        yield proxy
    finally:
        await proxy.close()


async def test_a_replaced_producer_is_fenced_and_what_it_wrote_stays_hidden(broker: Broker) -> None:
    old, new = transactions_of(broker), transactions_of(broker)
    partition = TopicPartition(broker.topics.prompts, 0)
    await old.fence()
    await old.commit(partition, [record(broker, b"1")], (1, "one"))
    await new.fence()
    with pytest.raises(LostError) as lost:
        await old.commit(partition, [record(broker, b"2")], (2, "two"))
    await new.commit(partition, [record(broker, b"3")], (3, "three"))
    await new.close()
    assert (lost.value.fenced, old.usable) == (True, False)
    assert [found.value() for found in await broker.read(broker.topics.results, count=2)] == [b"1", b"3"]
    assert await committed(broker) == (3, "three")


@pytest.mark.parametrize(("kind", "landed"), [("lost-answer", True), ("late", False)])
async def test_a_commit_cut_off_in_the_network_ends_its_producer_and_never_a_later_transaction(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, kind: Any, landed: bool
) -> None:
    partition = TopicPartition(broker.topics.prompts, 0)
    async with proxied(broker, monkeypatch) as proxy:
        old, new = transactions_of(broker), transactions_of(broker)
        await old.fence()
        # Late: the request reaches the broker when the next producer's transaction is open already.
        proxy.arm(Trap(kind=kind, keys=frozenset({END_TXN}), delay_s=1.0 if kind == "late" else 0.0))
        with pytest.raises(LostError):
            await old.commit(partition, [record(broker, b"1")], (1, "one"))
        assert not old.usable
        await asyncio.sleep(0 if kind == "late" else 0.5)
        await new.fence()
        assert await committed(broker) == ((1, "one") if landed else (-1, ""))
        producer = new._producer
        assert producer is not None
        await producer.begin_transaction()
        written = await producer.send_and_wait(broker.topics.results, b"open", partition=0)
        await asyncio.sleep(1.5)
        seen = await asyncio.to_thread(broker.read_now, broker.topics.results)
        assert [found.value() for found in seen] == ([b"1"] if landed else [])
        await producer.commit_transaction()
        found = await broker.read(broker.topics.results, count=1 + landed)
        await new.close()
    assert [one.value() for one in found] == ([b"1", b"open"] if landed else [b"open"])
    assert (proxy.num_trapped, written.partition) == (1, 0)


async def test_a_record_over_the_topics_limit_is_refused_and_its_transaction_with_it(kafka_server: str) -> None:
    broker = Broker(kafka_server, max_result_bytes=2_000)
    transactions = transactions_of(broker)
    await transactions.fence()
    with pytest.raises(RefusedError) as refused:
        await transactions.commit(
            TopicPartition(broker.topics.prompts, 0), [record(broker, b"1"), record(broker, b"x" * 70_000)], (2, "")
        )
    assert (refused.value.num_taken, refused.value.too_large) == (1, True)
    assert await committed(broker) == (-1, "")


async def test_one_record_too_large_for_its_topic_fails_alone(kafka_server: str) -> None:
    broker = Broker(kafka_server, max_result_bytes=3_000)
    async with serving(broker.section(), FakeGeneration()) as transport:
        await broker.say(*(f"small {index}" for index in range(10)), "huge 5000", *(f"more {index}" for index in range(10)))
        results = await broker.results(21)
        assert transport.status().delivery == "exactly_once"
    codes = Counter(result["error"]["code"] if "error" in result else "ok" for result in results)
    assert codes == Counter({"ok": 20, "result_too_large": 1})
    assert len({result["request_id"] for result in results}) == 21


async def test_commits_whose_answers_are_lost_repeat_and_lose_no_result(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with proxied(broker, monkeypatch) as proxy, serving(broker.section(), FakeGeneration()):
        for number, kind in enumerate(("lost-answer", "late", "lost-answer")):
            proxy.arm(Trap(kind=kind, keys=frozenset({END_TXN}), delay_s=0.3))  # type: ignore[arg-type]
            await broker.say(*(f"p {number} {index}" for index in range(5)))
            await broker.results(5 * (number + 1))
        trapped = proxy.num_trapped
        results = await broker.results(15)
    assert Counter(result["source"]["offset"] for result in results) == Counter({str(offset): 1 for offset in range(15)})
    assert trapped == 3


async def test_a_new_owner_goes_on_where_a_killed_one_stopped(broker: Broker) -> None:
    first, second = FakeGeneration(), FakeGeneration()
    metrics = Metrics()
    text = "pause 3 four words are here"
    await broker.say(text)
    async with serving(broker.section(), first, drain=False):
        await eventually(lambda: first.paused == 1)
        while len((await said(broker))[1]) < 3:  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.05)
    second.let_all_go()
    async with serving(broker.section(), second, metrics=metrics):
        (result,) = await broker.results(1)
    (_, call) = second.calls[0]
    assert (call.said, call.attempt, call.epoch, call.seed) == (((0, 1, 2),), 2, 2, first.calls[0][0].sampling.seed)
    assert (result["choices"][0]["text"], result["attempt"]) == (text, 2)
    starts, tokens = await said(broker)
    assert starts == [(1, 1, ["0"]), (2, 2, ["3"])]
    assert tokens == list(range(6))
    assert 'sluice_kafka_redeliveries_total{outcome="resumed"} 1.0' in metrics.render()[0].decode()


async def test_a_stopped_owner_hands_over_and_the_next_one_goes_on_at_once(broker: Broker) -> None:
    first, second = FakeGeneration(), FakeGeneration()
    await broker.say("pause 2 and then on")
    async with serving(broker.section(), first) as transport:
        await eventually(lambda: first.paused == 1)
        await transport.drain(0.0)
    second.let_all_go()
    async with serving(broker.section(), second):
        (result,) = await broker.results(1)
    kinds = [dict(found.headers())["sluice-type"] for found in await broker.read(broker.topics.chunks, count=5)]
    assert second.calls[0][1].said == ((0, 1),)
    assert result["choices"][0]["text"] == "pause 2 and then on"
    assert kinds.index(b"handover") < len(kinds) - kinds[::-1].index(b"started") - 1


async def test_a_prompt_that_ends_every_owner_that_starts_it_is_given_up(broker: Broker) -> None:
    await broker.say("hold without a word")
    for number in range(3):
        generation = FakeGeneration()
        async with serving(broker.section(), generation, drain=False):
            await broker.read(broker.topics.chunks, count=number + 1)
    last = FakeGeneration()
    async with serving(broker.section(), last):
        (result,) = await broker.results(1)
        (letter,) = await broker.read(broker.topics.dead_letters, count=1)
    assert (result["error"]["code"], last.calls) == ("crash_loop", [])
    assert (json.loads(letter.value())["error"]["code"], json.loads(letter.value())["attempts"]) == ("crash_loop", 4)


async def test_an_idempotency_key_outlives_its_owner(broker: Broker) -> None:
    key = {"sluice-idempotency-key": b"order 7"}
    first, second = FakeGeneration(), FakeGeneration()
    async with serving(broker.section(), first, drain=False):
        await broker.say("say it once", headers=key)
        await broker.say("unkeyed")
        await broker.results(2)
    async with serving(broker.section(), second):
        await broker.say("say it once", headers=key)
        found = await broker.read(broker.topics.results, count=3)
    assert second.calls == []
    repeated = found[-1]
    assert dict(repeated.headers())["sluice-duplicate-of"] == f"{broker.topics.prompts}-0-0".encode()
    assert json.loads(repeated.value())["choices"] == json.loads(found[0].value())["choices"]
    assert repeated.key() == f"{broker.topics.prompts}-0-2".encode()


async def test_a_replica_that_is_back_in_time_disturbs_no_other(broker: Broker) -> None:
    one, two, again = FakeGeneration(), FakeGeneration(), FakeGeneration()
    metrics = Metrics()
    section = broker.section(session_timeout_ms=20_000)
    async with serving(section.model_copy(update={"instance_id": "a"}), one, metrics=metrics) as first:
        back = serving(section.model_copy(update={"instance_id": "b"}), two)
        second = await back.__aenter__()
        await eventually(lambda: first.status().partitions == 1 and second.status().partitions == 1)
        for partition in (0, 1):
            await broker.say("pause 2 words and then more", partition=partition)
        await eventually(lambda: one.paused == 1 and two.paused == 1)
        rebalances = _value(metrics, "sluice_kafka_rebalances_total")
        await back.__aexit__(None, None, None)
        async with serving(section.model_copy(update={"instance_id": "b"}), again):
            await eventually(lambda: again.paused == 1)
            assert (first.status().partitions, one.running) == (1, 1)
            assert _value(metrics, "sluice_kafka_rebalances_total") == rebalances
            one.let_all_go()
            again.let_all_go()
            results = await broker.results(2)
    assert again.calls[0][1].said == ((0, 1),)
    assert [result["choices"][0]["text"] for result in results] == ["pause 2 words and then more"] * 2


async def test_the_broker_is_tried_before_it_is_trusted(broker: Broker) -> None:
    section = broker.section()
    assert await choose(section, clients_of(section), broker.topics) == Delivery(mode="exactly_once")
    weaker = broker.section(delivery="at_least_once")
    assert (await choose(weaker, clients_of(weaker), broker.topics)).mode == "at_least_once"


async def test_a_broker_that_only_acknowledges_transactions_is_not_trusted() -> None:
    topics = Topics("t.")
    embedded = EmbeddedBroker(host="127.0.0.1", port=0)
    await embedded.start(dict.fromkeys(topics.required, 1))
    try:
        section = KafkaSection(bootstrap_servers=embedded.bootstrap, topic_prefix="t.")
        clients = clients_of(section)
        reason = await probe(lambda: clients.transactional("t.probe"), clients, TopicPartition(topics.dead_letters, 0))
    finally:
        await embedded.close()
    assert "fence" in reason


async def test_progress_and_its_metadata_come_back_from_the_broker(broker: Broker) -> None:
    generation = FakeGeneration()
    await broker.say("hold a", "b", "hold c")
    async with serving(broker.section(), generation) as transport:
        await broker.results(1)
        await eventually(lambda: transport.status().running == 2)
        low, metadata = await committed(broker)
        found = decode(metadata)
        assert (low, found.epoch, found.done, found.next_offset, found.commits) == (0, 1, 0b10, 3, 2)
        await crash(transport)


async def said(broker: Broker) -> tuple[list[tuple[int, int, list[str]]], list[int]]:
    """The starts, (epoch, attempt, resume_from), and the tokens of all chunk records as they stand, whoever wrote them."""
    starts, tokens = [], []
    for found in await asyncio.to_thread(broker.read_now, broker.topics.chunks):
        body = json.loads(found.value())
        if dict(found.headers())["sluice-type"] == b"started":
            starts.append((body["epoch"], body["attempt"], body["resume_from"]))
        else:
            tokens += body["token_ids"]
    return starts, tokens


def _value(metrics: Metrics, name: str) -> float:
    found = [line for line in metrics.render()[0].decode().splitlines() if line.startswith(name + " ")]
    return float(found[0].split()[1])
