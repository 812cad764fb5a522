"""What the Kafka transport keeps when things stop, restart, fill up or move, on a real broker."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka import TopicPartition as ClientPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import UnknownTopicOrPartitionError
from confluent_kafka.admin import AdminClient, NewPartitions

from service.kafka.output import ProducerOutput
from service.kafka.records import OutRecord
from service.kafka.tracker import decode
from tests.integration.kafka_harness import Broker, eventually, serving
from tests.servers import kafka
from tests.service.kafka.fakes import FakeGeneration

pytestmark = pytest.mark.kafka


@pytest.fixture
def broker(kafka_server: str) -> Broker:
    return Broker(kafka_server)


async def committed(broker: Broker, partition: int = 0) -> tuple[int, str]:
    """The group's offset and metadata."""
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
    await admin.start()
    try:
        asked = ClientPartition(broker.topics.prompts, partition)
        found = await admin.list_consumer_group_offsets(broker.prefix + "group", partitions=[asked])
        return found[asked].offset, found[asked].metadata
    finally:
        await admin.close()


async def commits_of(broker: Broker, low: int, done: int) -> None:
    """Waits until the committed offset is `low` and the done-bits above it are `done`."""
    async with asyncio.timeout(20):
        while True:
            offset, metadata = await committed(broker)
            if (offset, decode(metadata).done) == (low, done):
                return
            await asyncio.sleep(0.05)


async def test_offsets_done_out_of_order_are_committed_and_skipped_after_a_restart(broker: Broker) -> None:
    first = FakeGeneration()
    await broker.say("hold a", "b", "hold c", "d")
    async with serving(broker.section(), first, drain=False):
        await broker.results(2)
        await commits_of(broker, low=0, done=0b1010)
    second = FakeGeneration()
    async with serving(broker.section(), second):
        second.let_all_go()
        results = await broker.results(4)
    assert sorted(second.started_texts()) == ["hold a", "hold c"]
    assert Counter(result["source"]["offset"] for result in results) == Counter({"0": 1, "1": 1, "2": 1, "3": 1})


async def test_a_restarted_owner_has_a_higher_epoch(broker: Broker) -> None:
    for expected in (1, 2):
        async with serving(broker.section(), FakeGeneration()) as transport:
            await eventually(lambda: transport.status().partitions == 2)
            assert decode((await committed(broker))[1]).epoch == expected


async def test_a_consumer_cut_off_in_the_middle_loses_no_prompt(broker: Broker) -> None:
    texts = [f"prompt {index}" for index in range(40)]
    held = FakeGeneration()
    for partition in (0, 1):
        await broker.say(
            *(("hold " + text if index % 3 == 0 else text) for index, text in enumerate(texts)), partition=partition
        )
    async with serving(broker.section(), held, drain=False):
        await broker.results(10)
    healthy = FakeGeneration()
    healthy.let_all_go()
    async with serving(broker.section(), healthy):
        results = await broker.results(80)
    seen = {result["request_id"] for result in results}
    assert seen == {f"{broker.topics.prompts}-{partition}-{offset}" for partition in (0, 1) for offset in range(40)}


async def test_a_redelivered_prompt_draws_from_the_same_seed(broker: Broker) -> None:
    first, second = FakeGeneration(), FakeGeneration()
    await broker.say("hold me")
    async with serving(broker.section(), first, drain=False):
        await eventually(lambda: len(first.calls) == 1)
    second.let_all_go()
    async with serving(broker.section(), second):
        await broker.results(1)
    assert first.calls[0][0].sampling.seed == second.calls[0][0].sampling.seed
    assert [call.epoch for _, call in (*first.calls, *second.calls)] == [1, 2]


async def test_the_intake_pauses_over_its_budget_and_goes_on_below_it(broker: Broker) -> None:
    generation = FakeGeneration()
    texts = [f"hold {index}" for index in range(30)]
    await broker.say(*texts)
    section = broker.section(intake_high_tokens=100, intake_low_tokens=50)
    async with serving(section, generation) as transport:
        await eventually(lambda: transport.status().paused_partitions == 2)
        taken = len(generation.calls)
        assert 0 < taken < 10
        generation.let_all_go()
        results = await broker.results(30)
        await eventually(lambda: transport.status().paused_partitions == 0)
        assert transport.status().intake_tokens == 0
    assert sorted(result["choices"][0]["text"] for result in results) == sorted(texts)
    assert generation.most_running < 10


async def test_a_full_window_holds_back_its_own_partition_alone(broker: Broker) -> None:
    generation = FakeGeneration()
    await broker.say("hold the window", *(f"p {index}" for index in range(40)))
    async with serving(broker.section(window_offsets=16), generation) as transport:
        await eventually(lambda: transport.status().paused_partitions == 1)
        assert len(generation.calls) == 16
        await broker.say("elsewhere", partition=1)
        await eventually(lambda: "elsewhere" in generation.started_texts())
        generation.let_all_go()
        results = await broker.results(42)
    assert len(results) == 42


async def test_two_consumers_share_and_a_rebalance_loses_nothing(broker: Broker) -> None:
    one, two = FakeGeneration(), FakeGeneration()
    async with serving(broker.section(), one) as first:
        await eventually(lambda: first.status().partitions == 2)
        for partition in (0, 1):
            await broker.say("hold long", *(f"x {index}" for index in range(20)), partition=partition)
        await eventually(lambda: one.running == 2)
        async with serving(broker.section(), two) as second:
            await eventually(lambda: first.status().partitions == 1 and second.status().partitions == 1)
            for partition in (0, 1):
                await broker.say(*(f"y {index}" for index in range(20)), partition=partition)
            # The generation of the partition that stayed goes on; the other's was cancelled and starts anew elsewhere.
            await eventually(lambda: one.running == 1 and two.running == 1)
            assert len(one.closed_early) == 1
            one.let_all_go()
            two.let_all_go()
            results = await broker.results(82)
    ids = Counter(result["request_id"] for result in results)
    assert set(ids) == {f"{broker.topics.prompts}-{partition}-{offset}" for partition in (0, 1) for offset in range(41)}
    held = Counter(prompt.text for prompt, _ in (*one.calls, *two.calls))
    assert held["hold long"] == 3


async def test_drain_finishes_what_runs_and_leaves_nothing_to_redo(broker: Broker) -> None:
    generation = FakeGeneration()
    await broker.say("hold on", "quick")
    async with serving(broker.section(), generation) as transport:
        await eventually(lambda: len(generation.calls) == 2)
        draining = asyncio.create_task(transport.drain(20))
        await eventually(lambda: transport.status().state == "draining")
        await broker.say("not any more")
        generation.let_all_go()
        assert await draining
    assert sorted(generation.started_texts()) == ["hold on", "quick"]
    assert len(await broker.results(2)) == 2
    assert (await committed(broker))[0] == 2


async def test_drain_gives_back_what_does_not_finish_in_time(broker: Broker) -> None:
    generation, successor = FakeGeneration(), FakeGeneration()
    await broker.say("hold for ever")
    async with serving(broker.section(), generation) as transport:
        await eventually(lambda: generation.running == 1)
        assert not await transport.drain(0.05)
    assert generation.closed_early == [f"{broker.topics.prompts}-0-0"]
    successor.let_all_go()
    async with serving(broker.section(), successor):
        (result,) = await broker.results(1)
    assert result["choices"][0]["text"] == "hold for ever"


async def test_no_record_is_taken_while_the_engine_is_dead(broker: Broker) -> None:
    generation, alive = FakeGeneration(), [False]
    await broker.say("waits for an engine")
    async with serving(broker.section(), generation, engine_alive=lambda: alive[0]) as transport:
        await eventually(lambda: transport.status().paused_partitions == 2)
        assert generation.calls == []
        alive[0] = True
        (result,) = await broker.results(1)
    assert result["status"] == "finished"


async def test_missing_topics_are_reported_until_they_exist(kafka_server: str) -> None:
    broker = Broker(kafka_server)
    section = broker.section().model_copy(update={"topic_prefix": broker.prefix + "other."})
    async with serving(section, FakeGeneration(), wait=False) as transport:
        await eventually(lambda: "sluice topics create" in transport.status().reason)
        assert transport.status().state == "unreachable"
    creating = section.model_copy(update={"create_topics": True, "partitions": 3, "replication_factor": 1})
    async with serving(creating, FakeGeneration()) as transport:
        await eventually(lambda: transport.status().partitions == 3)


@pytest.fixture(scope="module")
def own_server(kafka_server: str) -> Iterator[kafka.KafkaServer]:
    """A broker that a test may stop, and starts again; a cluster elsewhere is not ours to stop."""
    with kafka.running("kafka-faults", kafka.SHORT_LIVED) as server:
        yield server


@pytest.mark.timeout(240)
async def test_a_broker_that_stops_and_starts_again_loses_nothing(own_server: kafka.KafkaServer) -> None:
    broker, generation = Broker(own_server.bootstrap), FakeGeneration()
    async with serving(broker.section(), generation) as transport:
        await broker.say("before", "hold during")
        await broker.results(1)
        await eventually(lambda: generation.running == 1)
        await asyncio.to_thread(own_server.stop)
        await eventually(lambda: transport.status().state == "unreachable")
        generation.let_all_go()
        await asyncio.to_thread(own_server.start)
        await broker.say("after")
        results = await broker.results(3, within_s=90)
        await eventually(lambda: transport.status().state == "serving", within_s=60)
    texts = {result["choices"][0]["text"] for result in results}
    assert texts == {"before", "hold during", "after"}


@pytest.mark.timeout(240)
async def test_a_broker_that_comes_later_is_found(own_server: kafka.KafkaServer) -> None:
    broker, generation = Broker(own_server.bootstrap), FakeGeneration()
    await broker.say("early")
    await asyncio.to_thread(own_server.stop)
    async with serving(broker.section(), generation, wait=False) as transport:
        await eventually(lambda: transport.status().state == "unreachable")
        await asyncio.to_thread(own_server.start)
        results = await broker.results(1, within_s=90)
    assert json.dumps(results[0]["choices"][0]["text"]) == '"early"'


async def test_a_partition_that_a_topic_has_not_yet_is_an_error_that_passes(broker: Broker) -> None:
    section = broker.section()
    output = ProducerOutput(lambda: AIOKafkaProducer(bootstrap_servers=section.bootstrap_servers, enable_idempotence=True))
    record = OutRecord(topic=broker.topics.chunks, partition=2, value=b"{}")
    try:
        with pytest.raises(UnknownTopicOrPartitionError):
            await output.send(record)
        admin = AdminClient({"bootstrap.servers": broker.bootstrap})
        for future in admin.create_partitions([NewPartitions(broker.topics.chunks, 3)]).values():
            await asyncio.to_thread(future.result, 30)
        async with asyncio.timeout(30):
            while True:
                try:
                    await (await output.send(record))
                    break
                except UnknownTopicOrPartitionError:
                    await asyncio.sleep(0.1)
    finally:
        await output.close()
    broker.partitions = 3
    assert [(found.partition(), found.value()) for found in await broker.read(broker.topics.chunks, count=1)] == [(2, b"{}")]
