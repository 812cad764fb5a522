"""A replica of its own process that says `argv[2]` tokens (all, if 0) and then waits: to be killed. Prints its port."""

import asyncio
import sys

from tests.service.rpc.fakes import FakeGeneration, serving


async def main(port: int, tokens: int) -> None:
    generation = FakeGeneration()
    if tokens:
        generation.hold()
        generation.allow(tokens)
    async with serving(generation, port=port, coalesce_ms=0) as service:
        print(service.port, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
