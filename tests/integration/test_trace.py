"""What arrives in a real Jaeger over OTLP: the spans of calls that went well, were refused, and were given up."""

import contextlib

import pytest

from service.config import TracingSection
from service.errors import RequestError
from service.rpc.client import CallOptions, SluiceClient, SluiceError
from service.telemetry import names, tracing
from service.telemetry.tracing import Tracing
from tests.servers.jaeger import JaegerServer, parent_of, tags
from tests.service.rpc.fakes import FakeGeneration, serving

pytestmark = pytest.mark.jaeger

STREAM = names.rpc_span("Stream")


@pytest.fixture
def spans(jaeger_server: JaegerServer) -> Tracing:
    return Tracing(TracingSection(otlp_endpoint=jaeger_server.otlp_endpoint, service_name="sluice-test"), version="1.2.3")


async def test_a_stream_hangs_below_its_callers_span(jaeger_server, spans):
    caller = spans.start("caller")
    async with serving(tracing=spans) as service, SluiceClient(service.target) as client:
        options = CallOptions(traceparent=tracing.traceparent(caller))
        async with client.stream("hello", options=options) as events:
            received = [event async for event in events]
        spans.end(caller)
    found = jaeger_server.fetch_trace(tracing.trace_id(caller), until=lambda all_spans: len(all_spans) == 2)
    by_name = {span["operationName"]: span for span in found}
    assert parent_of(by_name[STREAM]) == by_name["caller"]["spanID"]
    assert parent_of(by_name["caller"]) is None
    seen = tags(by_name[STREAM])
    assert (seen["span.kind"], seen[names.RPC_SYSTEM_NAME], seen[names.RPC_METHOD]) == ("server", "grpc", STREAM)
    assert seen[names.RPC_RESPONSE_STATUS_CODE] == "OK"
    assert received[-1].trace_id == tracing.trace_id(caller)


async def test_a_refused_call_has_a_span_that_says_why(jaeger_server, spans):
    generation = FakeGeneration()
    generation.refusal = RequestError("prompt_too_long", "too long")
    caller = spans.start("caller")
    async with serving(generation, tracing=spans) as service, SluiceClient(service.target) as client:
        with pytest.raises(SluiceError):
            await client.generate("hello", options=CallOptions(traceparent=tracing.traceparent(caller)))
        spans.end(caller)
    found = jaeger_server.fetch_trace(tracing.trace_id(caller), until=lambda all_spans: len(all_spans) == 2)
    seen = next(tags(span) for span in found if span["operationName"] == names.rpc_span("Generate"))
    assert (seen["error"], seen[names.ERROR_TYPE]) == (True, "prompt_too_long")
    assert seen[names.RPC_RESPONSE_STATUS_CODE] == "INVALID_ARGUMENT"


async def test_a_call_that_its_caller_gave_up_has_a_span_that_says_so(jaeger_server, spans):
    generation = FakeGeneration()
    generation.hold()
    caller = spans.start("caller")
    async with serving(generation, tracing=spans) as service, SluiceClient(service.target) as client:
        with contextlib.suppress(SluiceError):
            await client.generate("hello", options=CallOptions(timeout_s=0.2, traceparent=tracing.traceparent(caller)))
        await generation.until(lambda: generation.aborted)
        await service.inference.idle()
        spans.end(caller)
    found = jaeger_server.fetch_trace(tracing.trace_id(caller), until=lambda all_spans: len(all_spans) == 2)
    seen = next(tags(span) for span in found if span["operationName"] == names.rpc_span("Generate"))
    assert seen[names.ERROR_TYPE] == "cancelled"


async def test_times_given_as_monotonic_stamps_arrive_as_those_times(jaeger_server, spans):
    start_ns = spans._monotonic_ns() - 2_000_000_000
    outer = spans.start("outer", at_ns=start_ns)
    inner = spans.start("inner", parent=tracing.context_of(outer), at_ns=start_ns + 500_000_000)
    spans.end(inner, at_ns=start_ns + 750_000_000)
    spans.end(outer, at_ns=start_ns + 1_000_000_000)
    assert spans.shutdown()
    found = jaeger_server.fetch_trace(tracing.trace_id(outer), until=lambda all_spans: len(all_spans) == 2)
    times = {span["operationName"]: (span["startTime"], span["duration"]) for span in found}
    assert times["outer"][1] == 1_000_000
    assert times["inner"][1] == 250_000
    assert times["inner"][0] - times["outer"][0] == 500_000
