"""`python -m tests.chaos.planted MUTANT serve …`: the `sluice` command with one fault planted in its commit protocol; `none` plants none.

The product has no switch for this: the fault is a patch of its classes, made in this process before the command starts. SIGUSR1 makes
it print where its tasks stand.
"""

import asyncio
import signal
import sys
from types import FrameType


def say_where(_: int, __: FrameType | None) -> None:
    """Prints the stack of every asyncio task: what a replica that does not end is waiting for."""
    for task in tuple(asyncio.tasks._all_tasks):
        if not task.done():
            task.print_stack(file=sys.stderr)
    sys.stderr.flush()


def main() -> None:
    signal.signal(signal.SIGUSR1, say_where)
    _, mutant, *arguments = sys.argv
    sys.argv = ["sluice", *arguments]
    if mutant != "none":
        from service.kafka import clients
        from tests.chaos.mutants import MUTANTS

        # Windows are widened, so most kills leave a transaction open: each barrier waits it out.
        clients.TRANSACTION_TIMEOUT_MS = 4_000
        MUTANTS[mutant].plant()
    from service.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
