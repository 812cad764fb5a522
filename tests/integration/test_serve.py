"""`sluice serve` as a process: what it prints, how it ends, and that nothing of it stays behind."""

import asyncio
import json
import os
import re
import signal
from pathlib import Path

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from service.rpc.client import SluiceClient
from tests.integration.app_harness import command, flags, gone, greedy, serve, tokens_of, values
from tests.integration.kafka_harness import Broker
from tests.integration.test_app import prompt_record

SLOW = {"stand_in_tokens_per_s": 20.0}


async def committed(broker: Broker) -> int:
    """The group's offset in partition 0."""
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
    await admin.start()
    try:
        asked = TopicPartition(broker.topics.prompts, 0)
        found = await admin.list_consumer_group_offsets(broker.prefix + "group", partitions=[asked])
        return int(found[asked].offset)
    finally:
        await admin.close()


@pytest.mark.kafka
async def test_sigterm_finishes_what_runs_commits_and_exits_with_0(tiny_model_dir: Path, topics_of_its_own: Broker) -> None:
    broker = topics_of_its_own
    async with serve(values(tiny_model_dir, broker=broker, engine=SLOW)) as sluice:
        child = await sluice.child()
        async with SluiceClient(sluice.facts["grpc"]) as client:
            begun = asyncio.Event()
            stream = asyncio.create_task(tokens_of(client, greedy("on the way", 40), begun))
            await broker.publish(prompt_record("durable", 40))
            await broker.read(broker.topics.chunks, count=2)
            await asyncio.wait_for(begun.wait(), 30)
            assert await sluice.ready() == 200
            sluice.send(signal.SIGTERM)
            await sluice.said("draining")
            assert await sluice.ready() == 503
            assert len(await stream) == 40
        code, _ = await sluice.finish()
    assert (code, "Traceback" in sluice.errors) == (0, False)
    (result,) = await broker.results(1)
    assert (result["status"], len(result["choices"][0]["token_ids"])) == ("finished", 40)
    assert await committed(broker) == 1
    await gone(child)


async def test_a_second_sigterm_ends_at_once(tiny_model_dir: Path) -> None:
    config = values(tiny_model_dir, engine={"stand_in_tokens_per_s": 0.5})
    async with serve(config) as sluice:
        child = await sluice.child()
        async with SluiceClient(sluice.facts["grpc"]) as client:
            begun = asyncio.Event()
            stream = asyncio.create_task(tokens_of(client, greedy("for ever", 200), begun))
            await asyncio.wait_for(begun.wait(), 30)
            sluice.send(signal.SIGTERM)
            await sluice.said("draining")
            sluice.send(signal.SIGTERM)
            code, _ = await asyncio.wait_for(sluice.finish(), 10)
            stream.cancel()
            await asyncio.wait({stream})
    assert code == 130
    await gone(child)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_while_it_loads_ends_it_and_its_child(tiny_model_dir: Path, number: signal.Signals) -> None:
    async with command("serve", *flags(values(tiny_model_dir))) as sluice:
        child = await sluice.child()
        child.suspend()
        sluice.send(number)
        code, _ = await sluice.finish()
    assert (code, sluice.errors.strip()) == (0, "stopped before it served")
    await gone(child)


async def test_a_terminal_that_goes_away_drains_and_does_not_break_it_off(tiny_model_dir: Path) -> None:
    """Its window is closed: kernel and shell both say so, to the engine child as well, and nothing can be written any more."""
    ours, terminal = os.openpty()
    arguments = flags(values(tiny_model_dir, engine=SLOW))
    async with command("serve", "--json", *arguments, terminal=terminal) as sluice:
        os.close(terminal)
        facts = await asyncio.to_thread(_facts, ours)
        child = await sluice.child()
        async with SluiceClient(facts["grpc"]) as client:
            begun = asyncio.Event()
            stream = asyncio.create_task(tokens_of(client, greedy("on the way", 40), begun))
            await asyncio.wait_for(begun.wait(), 30)
            os.close(ours)
            child.send_signal(signal.SIGHUP)
            sluice.send(signal.SIGHUP)
            assert len(await stream) == 40
        code, _ = await sluice.finish()
    assert code == 0
    await gone(child)


def _facts(descriptor: int) -> dict[str, str]:
    """What a terminal shows of `serve --json`; codes that move the cursor may stand before it."""
    said = b""
    while not (found := re.search(rb'\{"model".*\}', said)):
        said += os.read(descriptor, 4096)
    facts: dict[str, str] = json.loads(found[0])
    return facts


async def test_nohup_outlives_the_terminal(tiny_model_dir: Path) -> None:
    async with serve(values(tiny_model_dir), ignoring=signal.SIGHUP) as sluice:
        sluice.send(signal.SIGHUP)
        async with SluiceClient(sluice.facts["grpc"]) as client:
            assert len(await tokens_of(client, greedy("still here", 3))) == 3
        sluice.send(signal.SIGTERM)
        code, _ = await sluice.finish()
    assert code == 0


async def test_a_killed_service_takes_its_child_with_it(tiny_model_dir: Path) -> None:
    async with serve(values(tiny_model_dir)) as sluice:
        child = await sluice.child()
        sluice.send(signal.SIGKILL)
        await sluice.finish()
    await gone(child)


async def test_it_prints_its_endpoints_and_three_commands_to_try(tiny_model_dir: Path) -> None:
    config = values(tiny_model_dir, kafka={"enabled": True, "bootstrap_servers": "127.0.0.1:0", "topic_prefix": "t."})
    async with command("serve", "--embedded", *flags(config)) as sluice:
        await sluice.said("Ctrl-C drains")
        sluice.send(signal.SIGINT)
        code, out = await sluice.finish()
    assert (code, out) == (0, "")
    for words in ("gRPC    127.0.0.1:", "Kafka   127.0.0.1:", "/readyz", "sluice stream ", "sluice publish ", "sluice tail "):
        assert words in sluice.errors
