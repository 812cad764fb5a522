"""A task that forgets a cancellation is asked again."""

import asyncio

from service.cancellation import end_tasks


async def test_a_task_that_swallows_its_first_cancellation_is_ended() -> None:
    heard = 0

    async def deaf_once() -> None:
        nonlocal heard
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                heard += 1
                if heard == 2:
                    raise

    task = asyncio.create_task(deaf_once())
    await asyncio.sleep(0)
    await end_tasks({task}, ask_again_s=0.0)
    assert (task.cancelled(), heard) == (True, 2)


async def test_what_a_task_raised_is_not_raised_again() -> None:
    async def fails() -> None:
        raise ValueError

    await end_tasks({asyncio.create_task(fails())})


async def test_no_tasks_are_ended_at_once() -> None:
    await end_tasks(())
