"""The window of idempotency keys: who runs, who waits, what is remembered and for how long."""

import asyncio

from service.kafka.idempotency import IdempotencyWindow, Known


class Clock:
    def __init__(self) -> None:
        self.now_ms = 1_000_000

    def __call__(self) -> int:
        return self.now_ms


def known(result_offset: int, time_ms: int = 1_000_000) -> Known:
    return Known(result_offset=result_offset, request_id=f"t-0-{result_offset}", digest=b"d", time_ms=time_ms)


async def test_the_first_claims_and_the_second_waits_for_its_result() -> None:
    window = IdempotencyWindow()
    assert await window.claim(b"k", 0) is None
    second = asyncio.create_task(window.claim(b"k", 1))
    await asyncio.sleep(0)
    assert not second.done()
    window.settle(b"k", 0, known(7))
    assert await second == known(7)


async def test_a_claim_that_is_given_back_goes_to_one_of_those_who_wait() -> None:
    window = IdempotencyWindow()
    await window.claim(b"k", 0)
    waiting = [asyncio.create_task(window.claim(b"k", offset)) for offset in (1, 2)]
    await asyncio.sleep(0)
    window.settle(b"k", 0, None)
    done, left = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert [task.result() for task in done] == [None]
    assert len(left) == 1
    for task in left:
        task.cancel()


async def test_only_the_holder_of_a_claim_settles_it() -> None:
    window = IdempotencyWindow()
    await window.claim(b"k", 0)
    window.settle(b"k", 5, known(7))
    assert len(window) == 0


async def test_keys_are_forgotten_by_age_and_by_count() -> None:
    clock = Clock()
    window = IdempotencyWindow(end=5, max_keys=2, max_age_ms=1_000, wall_ms=clock)
    for offset in (10, 11, 12):
        window.restore(b"%d" % offset, known(offset))
    assert (len(window), window.low) == (2, 11)
    clock.now_ms += 1_001
    window.written(20)
    assert (window.low, len(window)) == (20, 0)
    assert await window.claim(b"12", 0) is None
