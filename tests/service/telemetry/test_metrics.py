"""What each verb changes in the exposition."""

import dataclasses

import pytest

from engine import StepStats
from service.contract import Timings, Usage
from service.telemetry.metrics import Metrics

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
BY = {"model": "m", "transport": "grpc"}
USAGE = Usage(prompt_tokens=10, cached_prompt_tokens=4, completion_tokens=3)
TIMINGS = Timings(queue_ms=1, ttft_ms=20, tpot_ms=30, total_ms=80)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_finished_request_counts_its_tokens_and_times(metrics):
    metrics.requests.finished(**BY, usage=USAGE, num_new_tokens=3, timings=TIMINGS)
    assert value(metrics, "sluice_requests_total", **BY, code="ok") == 1
    assert value(metrics, "gen_ai_server_request_duration_sum", **BY) == pytest.approx(0.08)
    assert value(metrics, "gen_ai_server_time_to_first_token_sum", **BY) == pytest.approx(0.02)
    assert value(metrics, "gen_ai_server_time_per_output_token_sum", **BY) == pytest.approx(0.03)
    assert value(metrics, "sluice_prompt_tokens_total", **BY) == 10
    assert value(metrics, "sluice_cached_prompt_tokens_total", **BY) == 4
    assert value(metrics, "sluice_completion_tokens_total", **BY) == 3


def test_a_failed_request_is_counted_and_kept_out_of_the_times(metrics):
    metrics.requests.finished(**BY, usage=USAGE, num_new_tokens=3, timings=TIMINGS, code="deadline_exceeded")
    assert value(metrics, "sluice_requests_total", **BY, code="deadline_exceeded") == 1
    assert value(metrics, "sluice_deadline_misses_total", stage="running") == 1
    assert value(metrics, "gen_ai_server_request_duration_count", **BY) == 0


def test_what_never_happened_has_no_time(metrics):
    # Four choices of one token each have a first token, and no time between two.
    usage = Usage(prompt_tokens=1, cached_prompt_tokens=0, completion_tokens=4)
    metrics.requests.finished(**BY, usage=usage, num_new_tokens=4, timings=dataclasses.replace(TIMINGS, tpot_ms=0.0))
    # A continuation of what had ended says nothing.
    metrics.requests.finished(
        **BY, usage=usage, num_new_tokens=0, timings=dataclasses.replace(TIMINGS, ttft_ms=0.0, tpot_ms=0.0)
    )
    times = ("request_duration", "time_to_first_token", "time_per_output_token")
    assert [value(metrics, f"gen_ai_server_{name}_count", **BY) for name in times] == [2, 1, 0]


def test_exemplars_carry_the_trace_id_in_openmetrics_only(metrics):
    metrics.requests.finished(**BY, usage=USAGE, num_new_tokens=3, timings=TIMINGS, trace_id="ab" * 16)
    plain, plain_type = metrics.render()
    rich, rich_type = metrics.render(OPENMETRICS)
    assert b"ab" * 16 not in plain
    assert f'# {{trace_id="{"ab" * 16}"}} 0.08'.encode() in rich
    assert (plain_type.split(";")[0], rich_type.split(";")[0]) == ("text/plain", "application/openmetrics-text")


def test_a_refusal_is_counted_by_code(metrics):
    metrics.requests.refused(transport="kafka", code="deadline_exceeded")
    assert value(metrics, "sluice_refusals_total", transport="kafka", code="deadline_exceeded") == 1
    assert value(metrics, "sluice_deadline_misses_total", stage="admission") == 1


def test_admission_shows_its_state(metrics):
    metrics.requests.admission(lambda: (2, 3, 400))
    seen = [value(metrics, f"sluice_{name}") for name in ("queue_depth", "admitted_requests", "admitted_tokens")]
    assert seen == [2, 3, 400]


def stats(**changes: int) -> StepStats:
    numbers = dict.fromkeys(StepStats.__dataclass_fields__, 0)
    return StepStats(**{**numbers, **changes})


def test_steps_show_the_last_state_and_add_up_what_they_did(metrics):
    metrics.engine.step(
        stats(num_running=5, num_free_blocks=7, num_prefill_tokens=8, num_prefix_hit_tokens=2, num_preemptions=1)
    )
    metrics.engine.step(stats(num_running=6, num_free_blocks=9, num_prefill_tokens=4, ended_ns=50_000_000))
    assert value(metrics, "sluice_running_sequences") == 6
    assert value(metrics, "sluice_kv_blocks", state="free") == 9
    assert value(metrics, "sluice_step_tokens_total", kind="prefill") == 12
    assert value(metrics, "sluice_prefix_hit_tokens_total") == 2
    assert value(metrics, "sluice_preemptions_total") == 1
    assert value(metrics, "sluice_step_duration_seconds_sum") == pytest.approx(0.05)


def test_a_dead_engine_runs_nothing(metrics):
    metrics.engine.step(stats(num_running=5, num_waiting=2))
    metrics.engine.died()
    metrics.engine.restarted()
    seen = [value(metrics, f"sluice_{name}") for name in ("running_sequences", "waiting_sequences")]
    assert seen == [0, 0]
    assert value(metrics, "sluice_engine_deaths_total") == value(metrics, "sluice_engine_restarts_total") == 1


def test_a_partition_that_is_lost_takes_its_series_with_it(metrics):
    for partition in (0, 1):
        metrics.kafka.lag("t", partition, 5)
        metrics.kafka.window("t", partition, 6)
    metrics.kafka.forget("t", 0)
    metrics.kafka.forget("t", 9)
    assert value(metrics, "sluice_kafka_lag", topic="t", partition="0") is None
    assert value(metrics, "sluice_kafka_window_used", topic="t", partition="1") == 6


def test_streams_are_counted_while_open(metrics):
    metrics.streams.opened()
    metrics.streams.opened()
    metrics.streams.closed(messages=7, merges=2)
    assert value(metrics, "sluice_streams") == 1
    assert value(metrics, "sluice_stream_messages_total") == 7
    assert value(metrics, "sluice_stream_merged_deltas_total") == 2


def test_two_services_in_a_process_share_no_number(metrics):
    metrics.ready(True)
    assert value(Metrics(), "sluice_ready") == 0
