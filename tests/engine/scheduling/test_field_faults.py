"""Faults that other engines had in the field, and the rules that keep them away."""

import pytest

from engine.errors import TooManyTokensError
from engine.scheduling.policy import MAX_PREEMPTIONS
from engine.scheduling.waiting import MAX_OVERTAKES
from tests.engine.scheduling.harness import Harness, request


def test_what_can_never_fit_is_refused_and_never_found_in_a_step() -> None:
    """vLLM #52530: the prompt fits the pool, prompt + output does not."""
    harness = Harness(num_blocks=3, block_size=4)
    with pytest.raises(TooManyTokensError) as caught:
        harness.add(request(prompt=8, max_tokens=5))
    assert caught.value.field == "sampling.max_tokens"


def test_what_fits_the_pool_exactly_runs_to_its_end() -> None:
    harness = Harness(num_blocks=3, block_size=4, watermark=0.4)
    harness.add(request(prompt=8, max_tokens=4))
    harness.drain()
    harness.check_ended()


def test_a_preempted_sequence_that_hits_its_own_blocks_stays_within_its_tokens() -> None:
    """nano-vllm #211: preempt, then a cache hit on admission pushed the counter out of range."""
    harness = Harness(num_blocks=6, block_size=2, max_model_len=12)
    harness.add(request("a", 4, 8))
    harness.add(request("b", 4, 8))
    harness.drain()
    assert harness.scheduler.stats().num_preemptions > 0
    harness.check_ended()


def test_a_step_in_which_someone_is_preempted_still_runs_someone() -> None:
    """nano-vllm #274: everything was preempted and the empty schedule asserted."""
    harness = Harness(num_blocks=4, block_size=1, max_model_len=4, enable_prefix_cache=False)
    for name in "abcd":
        harness.add(request(name, 1, 3))
    harness.drain()
    assert harness.scheduler.stats().num_preemptions > 0
    harness.check_ended()


def test_the_oldest_is_never_preempted() -> None:
    """vLLM #25538: sequences preempted each other for ever."""
    harness = Harness(num_blocks=8, block_size=1, max_model_len=8, enable_prefix_cache=False)
    for name in "abcd":
        harness.add(request(name, 2, 6))
    harness.drain()
    facts = harness.heard["a", 0].outputs[-1].facts
    assert facts is not None
    assert facts.num_preemptions == 0
    assert harness.scheduler.stats().num_preemptions > 0
    harness.check_ended()


def test_a_low_priority_oldest_is_not_preempted_by_a_stream_of_urgent_ones() -> None:
    harness = Harness(num_blocks=6, block_size=2, max_model_len=12, policy="priority")
    harness.add(request("old", 3, 9, priority=9))
    harness.step()
    for i in range(12):
        harness.add(request(f"new{i}", 4, 6))
        harness.step()
    assert harness.heard["old", 0].reason == "length"
    assert harness.heard["old", 0].outputs[-1].facts.num_preemptions == 0  # type: ignore[union-attr]


def test_after_sixteen_preemptions_a_sequence_takes_all_blocks_that_it_can_need() -> None:
    harness = Harness(num_blocks=8, block_size=2, max_model_len=16)
    harness.add(request("a", 2, 12))
    harness.planner.waiting.items[0].num_preemptions = MAX_PREEMPTIONS
    assert len(harness.step().chunks[0].new_block_ids) == 7


def test_a_disconnect_at_any_step_gives_all_blocks_back() -> None:
    """vLLM #46283: an abort at the wrong moment leaked blocks."""
    for step in range(8):
        harness = Harness(max_num_batched_tokens=3)
        harness.add(request("a", 9, 6, n=2))
        for _ in range(step):
            harness.step()
        harness.abort("a")
        harness.step()
        stats = harness.scheduler.stats()
        assert (stats.num_used_blocks, stats.num_running, stats.num_waiting) == (0, 0, 0)


def test_a_prompt_that_does_not_fit_now_does_not_block_a_smaller_one() -> None:
    harness = Harness(num_blocks=8, block_size=2, max_model_len=16)
    harness.add(request("running", 6, 8))
    harness.step()
    harness.add(request("large", 12, 2))
    harness.add(request("small", 2, 1))
    harness.step()
    assert harness.heard["small", 0].reason == "length"
    assert harness.heard["large", 0].outputs == []


def test_smaller_ones_do_not_starve_a_large_prompt() -> None:
    harness = Harness(num_blocks=8, block_size=2, max_model_len=16, max_num_waiting=1000, enable_prefix_cache=False)
    harness.add(request("first", 2, 6))
    harness.step()
    harness.add(request("large", 14, 1))
    number = 0
    while harness.heard["large", 0].reason is None and number < 4 * MAX_OVERTAKES:
        for _ in range(2):
            harness.add(request(f"small{number}", 3, 4))
            number += 1
        harness.step()
    assert harness.heard["large", 0].reason == "length"
    passed = [name for (name, _), heard in harness.heard.items() if name.startswith("small") and heard.outputs]
    assert 1 < len(passed) <= MAX_OVERTAKES


def test_a_sibling_goes_on_when_the_one_it_waits_for_fails() -> None:
    """The first choice computes the prompt; its end without one must not park the others for ever."""
    harness = Harness(block_size=4)
    harness.add(request("a", 8, 4, n=2, seed=3))
    harness.drain()
    harness.check_ended()
    assert harness.heard["a", 1].reason == "error"


def test_cached_blocks_that_nobody_holds_count_as_needed_when_letting_in() -> None:
    """A hit on an evictable block takes a block from those available, as a new block does."""
    harness = Harness(num_blocks=8, block_size=2, max_model_len=16)
    harness.add(request("warm", (2,) * 8, 1))
    harness.drain()
    harness.add(request("running", (3,) * 8, 4))
    harness.step()
    harness.add(request("cached", (2,) * 10, 1))
    harness.step()
    assert harness.scheduler.stats().num_waiting == 1
    harness.drain()
    harness.check_ended()
