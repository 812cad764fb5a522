"""A replica killed in the middle of a stream: its reader sees a pause."""

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import asynccontextmanager

from service.contract import Delta, Finished, SamplingFields, Started
from service.rpc.client import Backoff, SluiceClient
from tests.servers.tied import tie
from tests.service.rpc.fakes import token

WAIT_S = 60.0


@asynccontextmanager
async def replica(port: int, tokens: int):
    """(process, port) of a replica that serves; killed at the end of the block."""
    process: Process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.service.rpc.replica", str(port), str(tokens), stdout=PIPE
    )
    tie(process.pid)
    try:
        assert process.stdout is not None
        yield process, int(await asyncio.wait_for(process.stdout.readline(), WAIT_S))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_killed_replica_costs_its_reader_neither_a_token_nor_a_repetition():
    tokens: list[int] = []
    kinds: list[type] = []
    backoff = Backoff(first_s=0.05, most_s=0.2, attempts=300)
    async with replica(0, 7) as (process, port):
        client = SluiceClient(f"127.0.0.1:{port}", backoff=backoff)
        events = client.stream("hello", sampling=SamplingFields(max_tokens=20, seed=3))
        while len(tokens) < 7:
            event = await asyncio.wait_for(anext(events), WAIT_S)
            kinds.append(type(event))
            tokens.extend(event.token_ids if isinstance(event, Delta) else ())
        process.kill()
        await process.wait()
    async with client, replica(port, 0), asyncio.timeout(WAIT_S):
        async for event in events:
            kinds.append(type(event))
            tokens.extend(event.token_ids if isinstance(event, Delta) else ())
    assert tokens == [token(3, 0, position) for position in range(20)]
    assert (kinds.count(Started), kinds[-1]) == (1, Finished)
    assert events.num_resumes >= 1
