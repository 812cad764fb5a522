"""Ending asyncio tasks for certain.

Before Python 3.12 `asyncio.wait_for`, which client libraries use, forgets a cancellation that arrives together with the result it waits
for: the task goes on as if nothing had been asked. A task that is to end is therefore asked again until it has.
"""

import asyncio
from collections.abc import Collection
from typing import Any

ASK_AGAIN_S = 10.0
"""Longer than any clean-up of ours may take, so that none is cut short."""


async def end_tasks(tasks: Collection[asyncio.Task[Any]], ask_again_s: float = ASK_AGAIN_S) -> None:
    """Cancels the tasks and returns once all have ended; what they raised is not."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=ask_again_s)
    await asyncio.gather(*tasks, return_exceptions=True)
