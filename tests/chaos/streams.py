"""Streams of the real model whose owner is killed: each client's tokens are those of an uninterrupted run, one for one.

    python -m tests.chaos.streams [--streams 50] [--tokens 64]

Two replicas on one real broker serve SmolLM2-135M-Instruct in bfloat16 on the C++ operators, whose results do not depend on the batch.
Half of the prompts are greedy, half are sampled with a seed. The clients submit and attach over gRPC through the client library; once
each has its first tokens one replica is killed (SIGKILL). The uninterrupted run is one replica's, with other batches. Prints a JSON
summary; exit status 1 when a token differs, is missing or repeated, or a result is.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from service.contract import Delta, Finished, PromptRequest, SamplingFields
from service.rpc.client import Backoff, SluiceClient
from tests.integration.app_harness import Values, serve, values
from tests.integration.kafka_harness import Broker
from tests.servers import kafka
from tests.servers.model import model_dir

_PATIENT = Backoff(first_s=0.05, most_s=0.5, attempts=400)
_TOPICS = ("a river", "the sea", "an old clock", "bread", "winter", "a lighthouse", "maps", "the violin", "ants", "a railway")
_READ_S = 480.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one run showed. `moved`: streams that another replica finished; `resumes`: how often clients attached again."""

    streams: int
    tokens: int
    equal: int
    moved: int
    resumes: int
    results: int
    distinct_results: int
    results_equal: int
    uninterrupted_s: float
    interrupted_s: float

    @property
    def ok(self) -> bool:
        return self.equal == self.results == self.distinct_results == self.results_equal == self.streams and self.moved > 0


def prompts(count: int, tokens: int) -> list[PromptRequest]:
    """Distinct ones: the even ones greedy, the odd ones sampled."""
    return [
        PromptRequest(
            messages=(("user", f"Write line {number} of a story about {_TOPICS[number % len(_TOPICS)]}."),),
            sampling=SamplingFields(
                max_tokens=tokens, temperature=0.8 if number % 2 else 0.0, seed=number if number % 2 else None, ignore_eos=True
            ),
        )
        for number in range(count)
    ]


def replica(model: Path, broker: Broker) -> Values:
    """One of two on this machine."""
    engine = {"kind": "paged", "num_threads": 1, "kv_cache_bytes": 268_435_456}
    return values(model, broker=broker, engine=engine, kafka={"session_timeout_ms": 6_000})


async def read(client: SluiceClient, request_id: str, begun: asyncio.Event) -> tuple[list[int], int]:
    """The tokens as they came, and how often the stream was taken up again. A gap or a repetition fails."""
    said: list[int] = []
    stream = client.attach(request_id)
    async with asyncio.timeout(_READ_S), stream:
        async for event in stream:
            if isinstance(event, Delta):
                if event.seq != len(said):
                    raise AssertionError(f"{request_id}: token {event.seq} came after {len(said)}")
                said += event.token_ids
                begun.set()
            elif isinstance(event, Finished) and list(event.choices[0].token_ids) != said:
                raise AssertionError(f"{request_id}: the result differs from what was streamed")
    return said, stream.num_resumes


async def read_all(
    target: str | Sequence[str], asked: Sequence[PromptRequest], all_begun: Callable[[], None] = lambda: None
) -> tuple[list[str], list[tuple[list[int], int]]]:
    """The request ids and what `read` gives of each; `all_begun` is called once each has a token."""
    async with SluiceClient(target, backoff=_PATIENT) as client:
        ids = [await client.submit(prompt, key=f"stream {number}") for number, prompt in enumerate(asked)]
        begun = [asyncio.Event() for _ in ids]
        async with asyncio.TaskGroup() as group:
            reading = [group.create_task(read(client, *one)) for one in zip(ids, begun, strict=True)]
            async with asyncio.timeout(_READ_S):
                for event in begun:
                    await event.wait()
            all_begun()
    return ids, [task.result() for task in reading]


async def run(bootstrap: str, model: Path, *, streams: int, tokens: int) -> Outcome:
    """One run, on topics of its own."""
    asked = prompts(streams, tokens)
    began_s = time.monotonic()
    async with serve(replica(model, Broker(bootstrap))) as alone:
        _, whole = await read_all(alone.facts["grpc"], asked)
    between_s = time.monotonic()
    broker = Broker(bootstrap)
    config = replica(model, broker)
    async with AsyncExitStack() as stack:
        # Side by side: each loads the model.
        first, second = await asyncio.gather(*(stack.enter_async_context(serve(config)) for _ in range(2)))
        targets = [first.facts["grpc"], second.facts["grpc"]]
        ids, said = await read_all(targets, asked, first.process.kill)
        records = [json.loads(record.value()) for record in await broker.read(broker.topics.results, count=streams)]
    results: dict[str, Any] = {record["request_id"]: record for record in records}
    expected = [ids_said for ids_said, _ in whole]
    found = [results[request_id]["choices"][0]["token_ids"] if request_id in results else [] for request_id in ids]
    return Outcome(
        streams=streams,
        tokens=tokens,
        equal=sum(one == other for (one, _), other in zip(said, expected, strict=True)),
        moved=sum(int(record.get("attempt", 0)) > 1 for record in results.values()),
        resumes=sum(count for _, count in said),
        results=len(records),
        distinct_results=len(results),
        results_equal=sum(one == other for one, other in zip(found, expected, strict=True)),
        uninterrupted_s=round(between_s - began_s, 1),
        interrupted_s=round(time.monotonic() - between_s, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    with kafka.running("streams") as server:
        outcome = uvloop.run(run(server.bootstrap, model_dir(), streams=arguments.streams, tokens=arguments.tokens))
    print(json.dumps({**asdict(outcome), "ok": outcome.ok}))
    sys.exit(not outcome.ok)


if __name__ == "__main__":
    main()
