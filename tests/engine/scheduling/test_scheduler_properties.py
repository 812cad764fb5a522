"""I1-I10 under random operations: at least 100,000 of them a run, from byte programs that hypothesis draws and shrinks."""

from collections.abc import Iterator

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import TooManyTokensError
from tests.engine.scheduling.harness import Harness, request

MIN_OPERATIONS = 100_000


class Program:
    """Bytes read as choices; gives 0 when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._bytes: Iterator[int] = iter(data)
        self.at_end = False

    def below(self, bound: int) -> int:
        value = next(self._bytes, None)
        if value is None:
            self.at_end = True
            return 0
        return value % bound


def make_harness(program: Program) -> Harness:
    """A random pool, budget and rule set; the pool holds at least one full context in most cases, often little more."""
    block_size = (1, 2, 3, 4, 8)[program.below(5)]
    budget = (1, 2, 5, 16, 64)[program.below(5)]
    max_model_len = 12 + program.below(30)
    return Harness(
        block_size=block_size,
        num_blocks=max(2, max_model_len // block_size + program.below(40 // block_size + 4) - 2),
        max_num_seqs=1 + program.below(8),
        max_num_waiting=1 + program.below(40),
        max_num_batched_tokens=budget,
        max_prefill_chunk=(0, 1, 3, 8)[program.below(4)],
        max_model_len=max_model_len,
        enable_prefix_cache=program.below(4) > 0,
        policy=("fcfs", "priority")[program.below(2)],
        watermark=(0.0, 0.0, 0.4)[program.below(3)],
        preferred_num_seqs=(0, 1, 3)[program.below(3)],
        max_queue_delay_ns=(0, 4, 1000)[program.below(3)],
    )


def make_request(program: Program, number: int, max_model_len: int):
    """A random request; prompts share prefixes often, seeds poison some rows, some resume or have ended choices."""
    family = program.below(3)
    length = 1 + program.below((max_model_len - 2, max_model_len // 3)[program.below(2)])
    prompt = tuple((family * 5 + i * i) % 31 for i in range(length))
    max_tokens = 1 + program.below(min(24, max_model_len - length))
    n = (1, 1, 1, 2, 3)[program.below(5)]
    said: tuple[tuple[int, ...], ...] = ()
    ended: tuple[int, ...] = ()
    if program.below(5) == 1:
        said = tuple(tuple((3 + i + family) % 31 for i in range(program.below(max_tokens + 1))) for _ in range(n))
        ended = (program.below(n),) if n > 1 and program.below(3) == 0 else ()
    return request(
        f"r{number}",
        prompt,
        max_tokens,
        n=n,
        seed=program.below(256),
        min_tokens=program.below(max_tokens + 1) if program.below(3) == 1 else 0,
        ignore_eos=program.below(2) == 0,
        stop_token_ids=(5, 9) if program.below(3) == 1 else (),
        priority=program.below(4) - 1,
        cache_salt=("", "tenant")[program.below(2)],
        output_token_ids=said,
        ended_choices=ended,
    )


def run(data: bytes) -> Harness:
    """Interprets a program, drains, and checks everything that must hold at the end."""
    program = Program(data)
    harness = make_harness(program)
    while not program.at_end:
        kind = program.below(20)
        if kind < 4:
            candidate = make_request(program, len(harness.requests), harness.config.max_model_len)
            try:
                harness.add(candidate)
            except TooManyTokensError:
                needed = len(candidate.prompt_token_ids) + candidate.sampling.max_tokens
                assert needed > harness.config.num_blocks * harness.config.block_size
        elif kind == 4 and harness.requests:
            harness.abort(f"r{program.below(len(harness.requests))}")
        elif kind == 5 and harness.requests and program.below(4) == 0:
            harness.fail(f"r{program.below(len(harness.requests))}")
        elif kind == 6:
            harness.operations += 1
            harness.scheduler.reset_prefix_cache()
            harness.check()
        elif kind == 7:
            harness.operations += 1
            harness.scheduler.set_token_budget(program.below(80))
        elif kind == 8:
            harness.settle()
            plan = harness.schedule()
            if program.below(2):
                harness.model.run(plan, [0])
            harness.operations += 1
            harness.scheduler.retract(plan)
            harness.check()
        elif kind == 9 and harness.requests:
            harness.settle()
            plan = harness.schedule()
            harness.abort(f"r{program.below(len(harness.requests))}")
            harness.update(plan, [1])
        elif kind >= 14:
            harness.overlap(no_memory_ahead=program.below(8) == 7)
        else:
            harness.settle()
            harness.step(((1,), (1, 3), (2, 0, 1), (1, 1, 5))[program.below(4)])
    if len(data) % 2:
        harness.settle()
    harness.drain(ahead=len(data) % 2 == 0)
    harness.check_ended()
    return harness


def test_invariants_hold_and_outputs_equal_the_unbatched_reference_under_100_000_random_operations() -> None:
    totals = {"operations": 0, "preemptions": 0, "hits": 0, "ahead": 0}

    @settings(max_examples=450, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(min_size=250, max_size=700))
    def hold(data: bytes) -> None:
        harness = run(data)
        stats = harness.scheduler.stats()
        totals["operations"] += harness.operations
        totals["preemptions"] += stats.num_preemptions
        totals["hits"] += stats.num_prefix_hit_tokens
        totals["ahead"] += harness.num_ahead

    rounds = 0
    while totals["operations"] < MIN_OPERATIONS and rounds < 4:
        hold()
        rounds += 1
    print(totals)
    assert totals["operations"] >= MIN_OPERATIONS
    assert totals["preemptions"] > 200, "the programs no longer reach preemption"
    assert totals["hits"] > 1_000, "the programs no longer reach the prefix cache"
    assert totals["ahead"] > 5_000, "the programs no longer decide steps ahead"
