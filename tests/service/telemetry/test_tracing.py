"""The provider, contexts in and out of headers, stamps, and what costs nothing."""

import threading

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import StatusCode

from service.config import TracingSection
from service.errors import CODES
from service.telemetry import names, tracing
from service.telemetry.tracing import Tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans() -> Tracing:
    return Tracing(TracingSection(), memory=True)


def test_without_an_endpoint_nothing_is_recorded():
    off = Tracing(TracingSection())
    span = off.start("x")
    assert not off.enabled
    assert not span.is_recording()
    assert tracing.trace_id(span) == ""
    assert tracing.inject(span) == []
    assert off.shutdown()


def test_without_an_endpoint_the_callers_trace_still_passes_through():
    span = Tracing(TracingSection()).start("x", parent=tracing.extract([("traceparent", PARENT)]))
    assert tracing.traceparent(span) == PARENT


@pytest.mark.parametrize("value", [PARENT, PARENT.encode()])
@pytest.mark.parametrize("key", ["traceparent", "Traceparent"])
def test_a_parent_is_read_from_headers_of_text_and_bytes(key, value):
    context = trace.get_current_span(tracing.extract([("other", b"\xff"), (key, value)])).get_span_context()
    assert f"{context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert context.is_remote


@pytest.mark.parametrize("value", ["", "nonsense", b"\xff\xfe", None, "00-" + "0" * 32 + "-b7ad6b7169203331-01", PARENT * 40])
def test_a_malformed_parent_is_no_parent(value):
    context = tracing.extract([("traceparent", value)])
    assert not trace.get_current_span(context).get_span_context().is_valid
    assert tracing.link_to(context) == ()


def test_what_is_injected_is_extracted_again(spans):
    span = spans.start("x")
    read = trace.get_current_span(tracing.extract(tracing.inject(span))).get_span_context()
    assert (read.trace_id, read.span_id) == (span.get_span_context().trace_id, span.get_span_context().span_id)


def test_a_tracestate_is_passed_on(spans):
    parent = tracing.extract([("traceparent", PARENT), ("tracestate", "vendor=1")])
    assert dict(tracing.inject(spans.start("x", parent=parent)))["tracestate"] == "vendor=1"


def test_no_parent_means_a_new_trace_whatever_is_current(spans):
    with trace.use_span(spans.start("ambient")):
        assert spans.start("x").parent is None


def test_a_callers_decision_not_to_sample_is_followed(spans):
    span = spans.start("x", parent=tracing.extract([("traceparent", PARENT[:-2] + "00")]))
    spans.end(span)
    assert not span.is_recording()
    assert spans.spans() == ()


def test_a_ratio_of_zero_starts_no_trace_but_follows_a_sampled_one():
    spans = Tracing(TracingSection(sample_ratio=0), memory=True)
    spans.end(spans.start("own"))
    spans.end(spans.start("followed", parent=tracing.extract([("traceparent", PARENT)])))
    assert [span.name for span in spans.spans()] == ["followed"]


def test_monotonic_stamps_become_epoch_times():
    spans = Tracing(TracingSection(), memory=True, wall_ns=lambda: 10_000_000_000, monotonic_ns=lambda: 4_000_000_000)
    span = spans.start("x", at_ns=3_000_000_000)
    spans.event(span, names.EVENT_FIRST_TOKEN, at_ns=3_500_000_000)
    spans.end(span, at_ns=4_000_000_000)
    (ended,) = spans.spans()
    assert (ended.start_time, ended.events[0].timestamp, ended.end_time) == (9_000_000_000, 9_500_000_000, 10_000_000_000)


@pytest.mark.parametrize(("moved_ns", "expected"), [(400_000, 6_000_000_000), (5_000_000_000, 11_000_000_000)])
def test_the_offset_is_kept_through_jitter_and_follows_a_moved_clock(moved_ns, expected):
    wall = [10_000_000_000]
    spans = Tracing(TracingSection(), wall_ns=lambda: wall[0], monotonic_ns=lambda: 5_000_000_000)
    wall[0] += moved_ns
    assert spans.epoch_ns(1_000_000_000) == expected


@pytest.mark.parametrize("code", sorted(CODES))
def test_an_error_is_its_code_and_fixed_words(spans, code):
    span = spans.start("x")
    tracing.record_error(span, code)
    spans.end(span)
    (ended,) = spans.spans()
    assert ended.attributes[names.ERROR_TYPE] == code
    assert (ended.status.status_code, ended.status.description) == (StatusCode.ERROR, f"{code}: {CODES[code].meaning}")


def test_spans_carry_the_pinned_schema_and_the_service_name():
    spans = Tracing(TracingSection(service_name="mine"), version="9", memory=True)
    spans.end(spans.start("x"))
    (ended,) = spans.spans()
    assert ended.instrumentation_scope.schema_url == names.SCHEMA_URL
    assert ended.resource.attributes[names.SERVICE_NAME] == "mine"
    assert ended.resource.attributes[names.SERVICE_VERSION] == "9"


def test_a_link_points_at_the_span_of_a_context(spans):
    target = spans.start("target")
    (link,) = tracing.link_to(tracing.context_of(target))
    assert link.context == target.get_span_context()
    assert tracing.link_to(Context()) == ()


def test_tenants_are_told_apart_and_not_named():
    assert tracing.hashed("acme") == tracing.hashed("acme") != tracing.hashed("other")
    assert "acme" not in tracing.hashed("acme")
    assert tracing.hashed("") == ""


def test_shutdown_is_bounded_when_the_collector_does_not_answer(unused_tcp_port, monkeypatch):
    # Shorter than the exporter's first pause: it would go on, and draw its pauses at random, beside the tests that follow.
    monkeypatch.setattr(tracing, "_EXPORT_TIMEOUT_S", 0.5)
    spans = Tracing(TracingSection(otlp_endpoint=f"127.0.0.1:{unused_tcp_port}"))
    spans.end(spans.start("x"))
    spans.shutdown(timeout_s=0.05)
    assert not spans.enabled
    assert spans.shutdown()
    for thread in threading.enumerate():
        if thread.name == "tracing-shutdown":
            thread.join(30)
            assert not thread.is_alive()


def test_every_name_is_given_once():
    values = [value for key, value in vars(names).items() if key.isupper() and isinstance(value, str) and "." in value]
    assert len(values) == len(set(values))
