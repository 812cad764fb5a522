"""What one scheduler does, one behaviour each."""

import pytest

from engine.errors import ConfigError, EngineFullError, InvalidFieldError, PromptTooLongError, TooManyTokensError
from engine.scheduling.step import ChunkResult, StepPlan, StepResult
from tests.engine.scheduling.harness import Harness, request


def lengths(plan: StepPlan) -> list[int]:
    return [chunk.num_tokens for chunk in plan.chunks]


def test_an_idle_scheduler_plans_nothing() -> None:
    assert Harness().step() == StepPlan(step=0, starts=(), chunks=())


def test_a_prompt_is_one_chunk_and_every_later_step_one_token() -> None:
    harness = Harness()
    harness.add(request(prompt=5, max_tokens=3))
    assert [lengths(harness.step()) for _ in range(3)] == [[5], [1], [1]]
    assert not harness.scheduler.has_work


def test_a_start_carries_the_tokens_and_the_stop_tokens_without_repeats() -> None:
    harness = Harness()
    harness.add(request(prompt=(4, 5), stop_token_ids=(9, 1), ignore_eos=False))
    (start,) = harness.step().starts
    assert (start.token_ids, start.num_prompt_tokens, start.stop_token_ids) == ((4, 5), 2, (9, 1, 0))


def test_end_of_sequence_is_no_stop_token_under_ignore_eos() -> None:
    harness = Harness()
    harness.add(request(ignore_eos=True))
    assert harness.step().starts[0].stop_token_ids == ()


def test_a_prompt_longer_than_the_budget_is_cut_and_only_its_end_samples() -> None:
    harness = Harness(max_num_batched_tokens=4)
    harness.add(request(prompt=10))
    plans = [harness.step() for _ in range(3)]
    assert [lengths(plan) for plan in plans] == [[4], [4], [2]]
    assert [plan.chunks[0].samples for plan in plans] == [False, False, True]


def test_one_requests_share_of_a_step_is_capped() -> None:
    harness = Harness(max_prefill_chunk=3)
    harness.add(request("a", 7))
    harness.add(request("b", 7))
    assert lengths(harness.step()) == [3, 3]


def test_decodes_run_beside_a_prefill_and_stand_first() -> None:
    harness = Harness(max_num_batched_tokens=4)
    harness.add(request("a", 10))
    harness.add(request("b", 1, max_tokens=8))
    plans = [harness.step() for _ in range(4)]
    assert [lengths(plan) for plan in plans] == [[4], [4], [1, 2], [1, 1]]


def test_an_older_prefill_leaves_every_decode_its_token() -> None:
    harness = Harness(max_num_batched_tokens=4, policy="priority", num_blocks=32)
    harness.add(request("a", 2, max_tokens=9))
    harness.step()
    harness.add(request("b", 12, priority=-1))
    assert [lengths(harness.step()) for _ in range(3)] == [[1, 3]] * 3


def test_a_newcomer_waits_for_one_of_many_to_end() -> None:
    harness = Harness(preferred_num_seqs=2, max_queue_delay_ns=1000)
    harness.add(request("a", 1, max_tokens=3))
    harness.add(request("b", 1, max_tokens=9))
    harness.step()
    harness.add(request("c", 5))
    assert [lengths(harness.step()) for _ in range(3)] == [[1, 1], [1, 1], [1, 5]]


def test_a_newcomer_waits_no_longer_than_it_may() -> None:
    harness = Harness(preferred_num_seqs=1, max_queue_delay_ns=5)
    harness.add(request("a", 1, max_tokens=20))
    harness.step()
    harness.add(request("b", 2))
    # A step is two nanoseconds: its schedule comes at 1, 3 and 5 behind the arrival.
    assert [lengths(harness.step()) for _ in range(3)] == [[1], [1], [1, 2]]


def test_nobody_passes_a_newcomer_that_waits() -> None:
    harness = Harness(preferred_num_seqs=1, max_queue_delay_ns=9, policy="priority", num_blocks=32)
    harness.add(request("a", 1, max_tokens=20))
    harness.step()
    harness.add(request("b", 3))
    for _ in range(3):
        harness.step()
    harness.add(request("c", 2, priority=-1))
    # Three steps later "b" has waited long enough, not so "c", which comes first.
    assert [lengths(harness.step()) for _ in range(5)] == [[1], [1], [1], [1], [1, 2, 3]]


def test_single_tokens_follow_while_a_newcomer_waits() -> None:
    harness = Harness(preferred_num_seqs=1, max_queue_delay_ns=6)
    harness.add(request("a", 1, max_tokens=20))
    harness.step()
    harness.add(request("b", 2))
    added_ns = harness.now_ns
    harness.schedule()
    assert harness.scheduler.schedule_ahead(added_ns + 6, singles=True) is None
    ahead = harness.scheduler.schedule_ahead(added_ns + 5, singles=True)
    assert ahead is not None
    assert lengths(ahead) == [1]


def test_only_new_blocks_are_sent() -> None:
    harness = Harness(block_size=2)
    harness.add(request(prompt=3, max_tokens=4))
    assert [len(harness.step().chunks[0].new_block_ids) for _ in range(4)] == [2, 0, 1, 0]


def test_priority_runs_the_lower_number_first() -> None:
    harness = Harness(max_num_seqs=1, policy="priority")
    harness.add(request("late", 2, 1, priority=5))
    harness.add(request("soon", 2, 1, priority=1))
    harness.step()
    assert harness.heard["soon", 0].reason == "length"
    assert harness.heard["late", 0].reason is None


def test_at_most_max_num_seqs_run() -> None:
    harness = Harness(max_num_seqs=2)
    for name in "abc":
        harness.add(request(name, 1))
    harness.step()
    assert (harness.scheduler.stats().num_running, harness.scheduler.stats().num_waiting) == (2, 1)


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    with pytest.raises(PromptTooLongError) as caught:
        Harness(max_model_len=8).add(request(prompt=8, max_tokens=1))
    assert caught.value.field == "prompt"


def test_prompt_and_max_tokens_beyond_the_context_are_refused() -> None:
    with pytest.raises(TooManyTokensError):
        Harness(max_model_len=8).add(request(prompt=5, max_tokens=4))


def test_generation_ends_with_length_where_the_context_ends() -> None:
    harness = Harness(max_model_len=8)
    harness.add(request(prompt=5, max_tokens=3))
    harness.drain()
    assert (len(harness.heard["a", 0].token_ids), harness.heard["a", 0].reason) == (3, "length")


def test_an_id_that_is_running_is_refused() -> None:
    harness = Harness()
    harness.add(request("a"))
    with pytest.raises(InvalidFieldError) as caught:
        harness.scheduler.add(request("a"), 1)
    assert caught.value.field == "request_id"


def test_a_full_queue_refuses_and_keeps_nothing() -> None:
    harness = Harness(max_num_waiting=1)
    harness.add(request("a"))
    with pytest.raises(EngineFullError):
        harness.scheduler.add(request("b"), 1)
    assert harness.scheduler.stats().num_waiting == 1


def test_an_abort_is_only_a_mark_until_the_next_boundary() -> None:
    harness = Harness()
    harness.add(request("a"))
    harness.step()
    plan = harness.schedule()
    harness.abort("a")
    assert harness.scheduler.stats().num_used_blocks > 0
    (output,) = harness.update(plan, [1])
    assert (output.finish_reason, output.token_ids) == ("cancelled", ())
    assert harness.scheduler.stats().num_used_blocks == 0


def test_an_abort_ends_every_choice_that_has_not_ended() -> None:
    harness = Harness()
    harness.add(request("a", 9, n=3, ended_choices=(1,), output_token_ids=((), (3,), ())))
    harness.step()
    harness.abort("a")
    harness.step()
    assert {key: heard.reason for key, heard in harness.heard.items()} == {("a", 0): "cancelled", ("a", 2): "cancelled"}


def test_an_unknown_abort_is_ignored() -> None:
    harness = Harness()
    harness.scheduler.abort("nobody")
    assert not harness.scheduler.has_work


def test_fail_ends_a_request_with_its_code() -> None:
    harness = Harness()
    harness.add(request("a"))
    harness.fail("a")
    harness.step()
    assert (harness.heard["a", 0].reason, harness.heard["a", 0].code) == ("error", "out_of_memory")


def test_the_first_of_two_marks_counts() -> None:
    harness = Harness()
    harness.add(request("a"))
    harness.abort("a")
    harness.fail("a")
    harness.step()
    assert harness.heard["a", 0].reason == "cancelled"


def test_an_id_can_be_used_again_after_its_end() -> None:
    harness = Harness()
    harness.add(request("a", max_tokens=1))
    harness.step()
    assert harness.add(request("a", max_tokens=1))


def test_a_row_that_is_not_finite_ends_alone() -> None:
    harness = Harness()
    harness.add(request("a", 3))
    harness.add(request("b", 3))
    plan = harness.schedule()
    outputs = harness.scheduler.update(
        plan, StepResult(chunks=(ChunkResult(finite=False), ChunkResult(token_ids=(7,)))), harness.now_ns
    )
    assert [(output.request_id, output.error_code, output.token_ids) for output in outputs] == [
        ("a", "numeric_error", ()),
        ("b", "", (7,)),
    ]


def test_blocks_behind_a_row_that_is_not_finite_are_not_shared() -> None:
    harness = Harness(max_num_batched_tokens=8)
    harness.add(request("a", (2,) * 10))
    harness.step()
    plan = harness.schedule()
    harness.scheduler.update(plan, StepResult(chunks=(ChunkResult(finite=False),)), harness.now_ns)
    harness.scheduler.add(request("b", (2,) * 10), 9)
    harness.schedule()
    assert harness.scheduler.stats().num_prefix_hit_tokens == 0


def test_a_prefix_hit_is_rounded_down_to_blocks_and_skips_their_tokens() -> None:
    harness = Harness(block_size=4)
    harness.add(request("a", (2,) * 10, 1))
    harness.drain()
    harness.add(request("b", (2,) * 11, 1))
    (chunk,) = harness.step().chunks
    assert (chunk.start, chunk.num_tokens, len(chunk.new_block_ids)) == (8, 3, 3)
    assert harness.heard["b", 0].outputs[0].facts.num_cached_tokens == 8  # type: ignore[union-attr]


def test_the_last_token_of_a_fully_cached_prompt_is_computed() -> None:
    harness = Harness(block_size=4)
    for name in "ab":
        harness.add(request(name, (2,) * 8, 1))
        plan = harness.step()
    assert (plan.chunks[0].start, plan.chunks[0].num_tokens) == (4, 4)


def test_tenants_share_no_prefix() -> None:
    harness = Harness()
    for name in "ab":
        harness.add(request(name, (2,) * 9, 1, cache_salt=name))
        harness.drain()
    assert harness.scheduler.stats().num_prefix_hit_tokens == 0


def test_nothing_is_found_after_a_reset_of_the_cache() -> None:
    harness = Harness()
    harness.add(request("a", (2,) * 9, 1))
    harness.drain()
    harness.scheduler.reset_prefix_cache()
    harness.add(request("b", (2,) * 9, 1))
    harness.drain()
    assert harness.scheduler.stats().num_prefix_hit_tokens == 0


def test_siblings_wait_for_the_first_prefill_and_then_share_its_blocks() -> None:
    harness = Harness(block_size=4, max_num_batched_tokens=8)
    harness.add(request("a", 9, 3, n=3))
    assert [lengths(harness.step()) for _ in range(3)] == [[8], [1, 1, 1], [1, 1, 1]]
    harness.drain()
    harness.check_ended()


def test_siblings_of_a_prompt_below_one_block_do_not_wait() -> None:
    harness = Harness(block_size=4)
    harness.add(request("a", 3, n=2))
    assert lengths(harness.step()) == [3, 3]


def test_siblings_run_at_once_without_a_cache() -> None:
    harness = Harness(enable_prefix_cache=False)
    harness.add(request("a", 6, n=2))
    assert lengths(harness.step()) == [6, 6]


def test_a_resumed_request_goes_on_at_its_position() -> None:
    harness = Harness()
    harness.add(request("a", 5, 4, output_token_ids=((7, 8),)))
    harness.drain()
    assert harness.heard["a", 0].outputs[0].seq == 2
    harness.check_ended()


def test_a_request_that_had_said_all_ends_without_a_step() -> None:
    harness = Harness()
    harness.add(request("a", 5, 2, output_token_ids=((7, 8),)))
    assert lengths(harness.step()) == []
    assert (harness.heard["a", 0].reason, harness.heard["a", 0].outputs[0].seq) == ("length", 2)


def test_facts_come_with_the_first_and_the_last_output() -> None:
    harness = Harness()
    harness.add(request("a", 5, 3))
    harness.drain()
    facts = [output.facts for output in harness.heard["a", 0].outputs]
    assert [fact is not None for fact in facts] == [True, False, True]
    last = facts[-1]
    assert last is not None
    assert (last.num_output_tokens, last.num_steps, last.num_prefill_chunks, last.num_blocks) == (3, 3, 1, 2)
    assert last.added_ns < last.first_scheduled_ns < last.first_token_ns < last.last_token_ns


def test_a_retracted_step_is_sent_again_from_its_start() -> None:
    harness = Harness()
    harness.add(request("a", 5))
    plan = harness.schedule()
    harness.scheduler.retract(plan)
    again = harness.schedule()
    assert (again.starts, again.chunks) == (plan.starts, plan.chunks)


def test_a_smaller_budget_holds_and_everything_still_ends() -> None:
    harness = Harness()
    for name in "abc":
        harness.add(request(name, 5))
    harness.step()
    assert harness.scheduler.set_token_budget(0) == 1
    harness.drain()
    harness.check_ended()


def test_the_largest_request_of_a_plan_is_named() -> None:
    harness = Harness()
    harness.add(request("small", 2))
    harness.add(request("large", 9))
    assert harness.scheduler.largest_request(harness.schedule()) == "large"


def test_a_step_cannot_be_scheduled_twice() -> None:
    harness = Harness()
    harness.schedule()
    with pytest.raises(RuntimeError, match="neither been updated nor retracted"):
        harness.scheduler.schedule(1)


def test_a_result_of_another_size_is_refused_and_changes_nothing() -> None:
    harness = Harness()
    harness.add(request("a"))
    plan = harness.schedule()
    with pytest.raises(RuntimeError, match="0 results"):
        harness.scheduler.update(plan, StepResult(chunks=()), 1)
    assert harness.update(plan, [1])


def test_an_unusable_setting_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        Harness(block_size=0)
    assert caught.value.field == "engine.block_size"
