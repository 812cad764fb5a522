"""What samples come down to."""

import pytest

from service.bench.drive import Sample
from service.bench.summary import Targets, quantiles, summarize
from service.bench.target import Answer


def sample(
    due: float, first: float, end: float, *, tokens: int = 5, sent: float | None = None, engine: float | None = None
) -> Sample:
    """`tokens` in two messages, at `first` and at `end`."""
    return Sample(
        due_s=due,
        sent_s=due if sent is None else sent,
        ended_s=end,
        arrivals=((first, 1), (end, tokens - 1)),
        answer=Answer(prompt_tokens=10, completion_tokens=tokens, cached_prompt_tokens=4, engine_ttft_s=engine),
    )


def failed(due: float, end: float, code: str = "overloaded") -> Sample:
    return Sample(due_s=due, sent_s=due, ended_s=end, arrivals=(), answer=None, code=code)


def test_latencies_count_from_the_instant_at_which_a_request_was_due() -> None:
    found = summarize([sample(1.0, 1.5, 3.5, sent=1.25, engine=0.125)], 0.0, Targets())
    assert found.ttft_ms is not None
    assert found.e2e_ms is not None
    assert found.tpot_ms is not None
    assert found.itl_ms is not None
    assert found.late_ms is not None
    assert found.added_ttft_ms is not None
    assert (found.ttft_ms.p50, found.e2e_ms.p50, found.tpot_ms.p50, found.itl_ms.p50) == (500.0, 2500.0, 500.0, 2000.0)
    assert (found.late_ms.p50, found.added_ttft_ms.p50) == (250.0, 375.0)


def test_e_tps_counts_the_tokens_of_requests_that_met_their_deadline_alone() -> None:
    found = summarize([sample(0, 1, 2), sample(0, 1, 4, tokens=7), failed(0, 10)], 0.0, Targets(deadline_s=3.0))
    assert (found.output_tokens_per_s, found.e_tps, found.goodput_per_s) == (1.2, 0.5, 0.1)
    assert (found.elapsed_s, found.num_finished, found.errors) == (10, 2, {"overloaded": 1})


def test_without_a_deadline_there_is_no_e_tps() -> None:
    found = summarize([sample(0, 1, 2)], 0.0, Targets(ttft_s=5.0))
    assert (found.e_tps, found.as_json()["e_tps"], found.goodput_per_s) == (None, None, 0.5)


@pytest.mark.parametrize(
    ("targets", "good"), [(Targets(), 2), (Targets(ttft_s=1.0), 1), (Targets(tpot_s=0.3), 1), (Targets(ttft_s=0.1), 0)]
)
def test_goodput_asks_for_every_target(targets: Targets, good: int) -> None:
    found = summarize([sample(0, 1, 2), sample(0, 1.5, 10)], 0.0, targets)
    assert found.goodput_per_s * found.elapsed_s == pytest.approx(good)


def test_the_steady_rate_leaves_out_the_end_of_a_run() -> None:
    """Two places; the last request is sent at 2 s, when four have ended, and ends alone."""
    samples = [sample(t, t + 0.5, t + 1) for t in (0, 0, 1, 1)] + [sample(2, 3, 9)]
    assert summarize(samples, 0.0, Targets()).steady_requests_per_s == 2.0


def test_quantiles_are_by_nearest_rank() -> None:
    found = quantiles([i / 1e3 for i in range(1, 101)])
    assert found is not None
    assert (found.p50, found.p90, found.p99, found.max) == pytest.approx((50, 90, 99, 100))
    assert quantiles([]) is None


def test_nothing_at_all_is_a_summary_too() -> None:
    found = summarize([], 5.0, Targets())
    assert (found.num_requests, found.elapsed_s, found.e_tps, found.e2e_ms, found.p99_over_median) == (0, 0.0, None, None, None)
    assert found.as_json()["errors"] == {}
