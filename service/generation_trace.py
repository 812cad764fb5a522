"""The spans of one generation: `chat <model>` and, when it ends, `queue`, `prefill` and `decode` with the engine's own stamps.

Every request has them, refused, failed, cancelled and expired ones too. No span is ever current, none is made a token.
"""

from collections.abc import Sequence

from opentelemetry.trace import SpanKind

from engine import SamplingParams
from service.contract import Call, ChoiceResult, PromptRequest, Timings, Usage
from service.errors import Code
from service.measured import Measured
from service.telemetry import names
from service.telemetry.tracing import Tracing, context_of, hashed, record_error, trace_id


class GenerationTrace:
    """One request's spans, begun when it arrives. End it once, with `refused` or `ended`."""

    def __init__(self, tracing: Tracing, model: str, prompt: PromptRequest, call: Call, arrived_ns: int) -> None:
        self._tracing = tracing
        self._arrived_ns = arrived_ns
        self.span = tracing.start(names.chat_span(model), parent=call.parent, kind=SpanKind.INTERNAL, at_ns=arrived_ns)
        self._records = self.span.is_recording()
        if self._records:
            self._describe(model, prompt, call)

    def _describe(self, model: str, prompt: PromptRequest, call: Call) -> None:
        chat = prompt.messages is not None
        attributes: dict[str, str | int] = {
            names.GEN_AI_OPERATION_NAME: names.OPERATION_CHAT if chat else names.OPERATION_TEXT_COMPLETION,
            names.GEN_AI_PROVIDER_NAME: names.PROVIDER,
            names.GEN_AI_REQUEST_MODEL: model,
            names.GEN_AI_RESPONSE_ID: call.request_id,
            names.REQUEST_ID: call.request_id,
            names.TRANSPORT: call.transport,
            names.ATTEMPT: call.attempt,
        }
        if prompt.label:
            attributes[names.LABEL] = prompt.label
        if call.tenant:
            attributes[names.TENANT] = hashed(call.tenant)
        if call.epoch:
            attributes[names.EPOCH] = call.epoch
        self.span.set_attributes(attributes)

    @property
    def trace_id(self) -> str:
        return trace_id(self.span)

    @property
    def exemplar(self) -> str:
        """The trace id, where there is a trace to find by it."""
        return self.trace_id if self._records else ""

    def accepted(self, sampling: SamplingParams, num_prompt_tokens: int, num_resumed_tokens: int) -> None:
        """What it will be run with."""
        if not self._records:
            return
        self.span.set_attributes(
            {
                names.GEN_AI_REQUEST_MAX_TOKENS: sampling.max_tokens,
                names.GEN_AI_REQUEST_TEMPERATURE: sampling.temperature,
                names.GEN_AI_REQUEST_TOP_P: sampling.top_p,
                names.GEN_AI_REQUEST_TOP_K: sampling.top_k,
                names.GEN_AI_REQUEST_SEED: sampling.seed,
                names.GEN_AI_REQUEST_CHOICE_COUNT: sampling.n,
                names.GEN_AI_USAGE_INPUT_TOKENS: num_prompt_tokens,
                names.RESUMED_TOKENS: num_resumed_tokens,
            }
        )

    def refused(self, code: Code, now_ns: int, queue_depth: int) -> None:
        """It was not accepted: all its time was spent in the queue."""
        if not self._records:
            return
        record_error(self.span, code)
        self._child(names.SPAN_QUEUE, self._arrived_ns, now_ns, {names.QUEUE_DEPTH: queue_depth})
        self._tracing.end(self.span, at_ns=now_ns)

    def ended(
        self,
        measured: Measured,
        choices: Sequence[ChoiceResult],
        usage: Usage,
        timings: Timings,
        code: Code | None,
        now_ns: int,
        queue_depth: int,
    ) -> None:
        """It has ended; `code` None is success. `queue_depth`: requests admitted when it came."""
        if not self._records:
            return
        self.span.set_attributes(
            {
                names.GEN_AI_RESPONSE_FINISH_REASONS: [choice.finish_reason for choice in choices],
                names.GEN_AI_USAGE_OUTPUT_TOKENS: usage.completion_tokens,
                names.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: usage.cached_prompt_tokens,
                names.KV_BLOCKS: measured.num_blocks,
                names.PREEMPTIONS: measured.num_preemptions,
                names.TIMING_QUEUE_MS: timings.queue_ms,
                names.TIMING_TTFT_MS: timings.ttft_ms,
                names.TIMING_TPOT_MS: timings.tpot_ms,
                names.TIMING_TOTAL_MS: timings.total_ms,
            }
        )
        if code is not None:
            record_error(self.span, code)
        self._phases(measured, usage, now_ns, queue_depth)
        self._tracing.end(self.span, at_ns=now_ns)

    def _phases(self, measured: Measured, usage: Usage, now_ns: int, queue_depth: int) -> None:
        scheduled, first, last = measured.first_scheduled_ns, measured.first_token_ns, measured.last_token_ns
        self._child(names.SPAN_QUEUE, self._arrived_ns, scheduled or now_ns, {names.QUEUE_DEPTH: queue_depth})
        if scheduled:
            self._child(
                names.SPAN_PREFILL,
                scheduled,
                first or now_ns,
                {
                    names.PREFILL_TOKENS: usage.prompt_tokens,
                    names.PREFILL_CACHED_TOKENS: usage.cached_prompt_tokens,
                    names.PREFILL_CHUNKS: measured.num_chunks,
                },
            )
        if first:
            self._child(
                names.SPAN_DECODE,
                first,
                max(first, last),
                {names.DECODE_STEPS: measured.num_steps, names.PREEMPTIONS: measured.num_preemptions},
                event=names.EVENT_FIRST_TOKEN,
            )

    def _child(self, name: str, start_ns: int, end_ns: int, attributes: dict[str, int], *, event: str = "") -> None:
        span = self._tracing.start(name, parent=context_of(self.span), attributes=attributes, at_ns=start_ns)
        if event:
            self._tracing.event(span, event, at_ns=start_ns)
        self._tracing.end(span, at_ns=end_ns)
