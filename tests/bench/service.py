"""Output tokens a second through the whole service, against the engine offline, in one interleaved run.

    python -m tests.bench.service [--concurrent 16] [--requests 48] [--prompt-tokens 64] [--new-tokens 32] [--blocks 3]

Closed loop: as many requests in flight as `concurrent`, the next one when one ends. Offline: `Engine` stepped in this process.
gRPC: `Stream` calls of the client library. Kafka: prompt records in, result records out, on a real Apache Kafka broker on the
same machine. The load generator and the broker share the cores with the service: these figures hold for that.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from engine import Engine, EngineConfig, Request, SamplingParams
from engine.openmp import prefer_short_spin
from service.cli.demo_model import ensure_demo_model
from service.contract import PromptRequest, SamplingFields
from service.rpc.client import SluiceClient
from tests.bench import report
from tests.bench.served import Served, serving
from tests.servers import kafka

Prompts = list[tuple[int, ...]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrent", type=int, default=16)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def offline(engine: Engine, prompts: Prompts, arguments: argparse.Namespace, block: int) -> float:
    """Seconds for all prompts."""
    sampling = SamplingParams(max_tokens=arguments.new_tokens, seed=0, temperature=0.0, ignore_eos=True)
    waiting = [Request(request_id=f"{block}-{i}", prompt_token_ids=ids, sampling=sampling) for i, ids in enumerate(prompts)]
    start, running, ended = time.perf_counter(), 0, 0
    while ended < len(prompts):
        while waiting and running < arguments.concurrent:
            engine.add(waiting.pop())
            running += 1
        done = sum(output.finish_reason is not None for output in engine.step().outputs)
        running, ended = running - done, ended + done
    return time.perf_counter() - start


async def over_grpc(served: Served, prompts: Prompts, arguments: argparse.Namespace) -> float:
    """Seconds for all prompts."""
    sampling = SamplingFields(max_tokens=arguments.new_tokens, temperature=0.0, ignore_eos=True)

    async with SluiceClient(served.grpc) as client:

        async def one(ids: tuple[int, ...]) -> None:
            async with client.stream(PromptRequest(token_ids=ids, sampling=sampling)) as events:
                async for _ in events:
                    pass

        start = time.perf_counter()
        await _closed_loop(one, prompts, arguments.concurrent)
        return time.perf_counter() - start


async def over_kafka(served: Served, prompts: Prompts, arguments: argparse.Namespace) -> float:
    """Seconds for all prompts."""
    sampling = {"max_tokens": arguments.new_tokens, "temperature": 0.0, "ignore_eos": True}
    consumer = AIOKafkaConsumer(
        "sluice.results", bootstrap_servers=served.kafka, auto_offset_reset="latest", fetch_max_wait_ms=50
    )
    producer = AIOKafkaProducer(bootstrap_servers=served.kafka)
    async with consumer, producer:
        for partition in consumer.assignment():
            await consumer.position(partition)
        ends: dict[str, asyncio.Future[None]] = {}

        async def read() -> None:
            async for record in consumer:
                value = json.loads(record.value)
                if value["status"] != "finished":
                    raise RuntimeError(f"a prompt failed: {value['error']}")
                ends.setdefault(value["request_id"], asyncio.get_running_loop().create_future()).set_result(None)

        async def one(ids: tuple[int, ...]) -> None:
            value = json.dumps({"token_ids": ids, "sampling": sampling}).encode()
            sent = await producer.send_and_wait("sluice.prompts", value, key=str(hash(ids)).encode())
            request_id = f"{sent.topic}-{sent.partition}-{sent.offset}"
            await ends.setdefault(request_id, asyncio.get_running_loop().create_future())

        reading = asyncio.create_task(read())
        start = time.perf_counter()
        work = asyncio.create_task(_closed_loop(one, prompts, arguments.concurrent))
        await asyncio.wait({reading, work}, return_when=asyncio.FIRST_COMPLETED)
        took = time.perf_counter() - start
        if reading.done():
            work.cancel()
            reading.result()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        work.result()
        return took


async def _closed_loop(one: Callable[[tuple[int, ...]], Awaitable[None]], prompts: Prompts, concurrent: int) -> None:
    left = list(prompts)

    async def worker() -> None:
        while left:
            await one(left.pop())

    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrent):
            tasks.create_task(worker())


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    prefer_short_spin()
    draw = random.Random(arguments.seed)

    def prompts() -> Prompts:
        return [tuple(draw.randrange(1000, 40_000) for _ in range(arguments.prompt_tokens)) for _ in range(arguments.requests)]

    tokens = arguments.requests * arguments.new_tokens
    rates: dict[str, list[float]] = {"offline": [], "grpc": [], "kafka": []}
    with (
        kafka.running("bench") as broker,
        serving("--brokers", broker.bootstrap, "--set", "kafka.create_topics=true") as served,
    ):
        engine = Engine(EngineConfig(model_dir=str(ensure_demo_model()), kv_cache_bytes=256 * 2**20))
        offline(engine, prompts()[: arguments.concurrent], arguments, -1)
        asyncio.run(over_grpc(served, prompts()[: arguments.concurrent], arguments))
        asyncio.run(over_kafka(served, prompts()[: arguments.concurrent], arguments))
        for block in range(arguments.blocks):
            rates["offline"].append(tokens / offline(engine, prompts(), arguments, block))
            rates["grpc"].append(tokens / asyncio.run(over_grpc(served, prompts(), arguments)))
            rates["kafka"].append(tokens / asyncio.run(over_kafka(served, prompts(), arguments)))
    results: dict[str, Any] = {"tokens_per_s": {name: report.spread(values) for name, values in rates.items()}}
    for name in ("grpc", "kafka"):
        ratios = [mine / base for mine, base in zip(rates[name], rates["offline"], strict=True)]
        results[f"{name}_against_offline"] = report.spread(ratios)
    return report.emit("service", vars(arguments), results | {"probe": report.probe()})


if __name__ == "__main__":
    report.print_report(measure(parse()))
