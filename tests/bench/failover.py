"""How long streams are silent when their replica goes: killed, by session time-out; stopped in order, by heartbeat interval.

    python -m tests.bench.failover [--streams 50] [--sessions 1000 3000 6000] [--heartbeats 100 300 1000] [--rounds 2]

Two replicas on one real broker, the stand-in engine at 40 tokens a second, prompts that would run for a minute. A kill: from SIGKILL to
the first token of each of the killed replica's streams from its new owner. A planned stop: SIGTERM with no grace, from the last token of
the old owner to the first of the new one. Times are the broker's own (append time of the chunk records), the kill's is this machine's.
The streams' tokens are compared with an uninterrupted run's.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from tests.bench import report
from tests.bench.kafka_load import publish
from tests.chaos.plan import Shape
from tests.chaos.prompts import expected_tokens
from tests.chaos.recorder import read_all, seen
from tests.chaos.scene import Scene, Stage, scene, stage

PROMPT = (70, 80, 90, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """One stream that changed its owner: seconds without a token, and whether its tokens are the right ones so far."""

    since_fault_s: float
    since_token_s: float
    right: bool


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=report.at_least(1), default=50)
    parser.add_argument("--sessions", type=int, nargs="*", default=[1_000, 3_000, 6_000])
    parser.add_argument("--heartbeats", type=int, nargs="*", default=[100, 300, 1_000])
    parser.add_argument("--rounds", type=report.at_least(1), default=2)
    parser.add_argument("--before", type=float, default=3.0, help="seconds from the first token of all to the fault")
    return parser.parse_args()


def silences(here: Scene, at_ms: float) -> list[Silence]:
    """Of every stream whose epoch grew."""
    chunks: dict[str, list[Any]] = defaultdict(list)
    for message in read_all(here.bootstrap, here.topic("chunks"), isolation="read_uncommitted"):
        record = seen(message, "uncommitted", here.prefix)
        if record.type == "chunk":
            chunks[record.key].append(record)
    found = []
    for records in chunks.values():
        epochs = [int(record.value["epoch"]) for record in records]
        first = next((i for i, epoch in enumerate(epochs) if epoch > epochs[0]), 0)
        if not first:
            continue
        said: list[int] = []
        for record in records:
            del said[int(record.value.get("seq", 0)) :]
            said += record.value["token_ids"]
        found.append(
            Silence(
                since_fault_s=(records[first].timestamp_ms - at_ms) / 1_000,
                since_token_s=(records[first].timestamp_ms - records[first - 1].timestamp_ms) / 1_000,
                right=tuple(said) == expected_tokens(PROMPT, 1, 0, len(said)),
            )
        )
    return found


async def one(
    on: Stage, arguments: argparse.Namespace, *, session: int, heartbeat: int, kill: bool, number: int
) -> list[Silence]:
    """One round: streams on two replicas, one of which goes."""
    # A static member keeps its partitions for the session time-out, to have them back when it restarts: what would be measured here.
    shape = Shape(replicas=2, brokers=1, session_timeout_ms=session, tokens_per_s=40.0, static_members=False)
    overrides = {"kafka.heartbeat_interval_ms": heartbeat, "admin.drain_grace_s": 0.0}
    with tempfile.TemporaryDirectory() as directory:
        async with scene(on, shape, Path(directory), overrides=overrides, prefix=f"failover{number}.") as here:
            await here.start_replicas()
            await asyncio.to_thread(_publish, here, arguments.streams)
            await asyncio.to_thread(_all_begun, here, arguments.streams)
            await asyncio.sleep(arguments.before)
            replica, at_ms = here.replicas[0], time.time() * 1_000
            await (replica.kill() if kill else replica.terminate())
            await asyncio.sleep(6.0 + (session / 1_000 if kill else 0.0))
            return await asyncio.to_thread(silences, here, at_ms)


def _publish(here: Scene, count: int) -> None:
    sampling = {"max_tokens": 4_000, "seed": 1, "ignore_eos": True}
    value = json.dumps({"token_ids": PROMPT, "sampling": sampling}).encode()
    publish(here.bootstrap, lambda _: value, count=count, partitions=here.shape.partitions, topic=here.topic("prompts"))


def _all_begun(here: Scene, count: int) -> None:
    deadline = time.monotonic() + 60
    while (
        len({record.key() for record in read_all(here.bootstrap, here.topic("chunks"), isolation="read_uncommitted")}) < count
    ):
        if time.monotonic() > deadline:
            raise TimeoutError("the streams did not begin")
        time.sleep(0.2)


def _figures(found: list[Silence], *, field: str) -> dict[str, Any]:
    times = [getattr(silence, field) for silence in found]
    return {
        "streams_moved": len(found),
        "silent_s": report.quantiles(times, 3) if times else {},
        "longest_s": round(max(times, default=0.0), 3),
        "tokens_right": sum(silence.right for silence in found),
    }


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    began = report.environment()
    results: dict[str, Any] = {"killed_by_session_timeout_ms": {}, "stopped_by_heartbeat_ms": {}}
    number = 0
    async with stage(1, tag="failover") as on:
        for session in arguments.sessions:
            found: list[Silence] = []
            for _ in range(arguments.rounds):
                number += 1
                found += await one(on, arguments, session=session, heartbeat=max(100, session // 10), kill=True, number=number)
            results["killed_by_session_timeout_ms"][session] = _figures(found, field="since_fault_s")
            print(
                f"killed, session {session} ms: {results['killed_by_session_timeout_ms'][session]}", file=sys.stderr, flush=True
            )
        for heartbeat in arguments.heartbeats:
            found = []
            for _ in range(arguments.rounds):
                number += 1
                found += await one(on, arguments, session=10_000, heartbeat=heartbeat, kill=False, number=number)
            results["stopped_by_heartbeat_ms"][heartbeat] = _figures(found, field="since_token_s")
            print(
                f"stopped, heartbeat {heartbeat} ms: {results['stopped_by_heartbeat_ms'][heartbeat]}",
                file=sys.stderr,
                flush=True,
            )
    return report.emit("failover", vars(arguments), results, began)


if __name__ == "__main__":
    report.print_report(uvloop.run(measure(parse())))
