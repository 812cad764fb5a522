"""Result and stream messages back to the types of `service.contract`: for whoever reads what a service has written.

Guarantee: never fails for a message, whatever version wrote it: an error code that is not in this version's list reads as `internal`.
"""

from typing import cast

from engine import FinishReason
from schemas.v1 import inference_pb2
from service.contract import ChoiceResult, Failed, Finished, Timings, Usage
from service.errors import CODES, RequestError
from service.wire import logprobs_from_proto


def usage_of(message: inference_pb2.Usage) -> Usage:
    """Token counts."""
    return Usage(
        prompt_tokens=message.prompt_tokens,
        cached_prompt_tokens=message.cached_prompt_tokens,
        completion_tokens=message.completion_tokens,
    )


def timings_of(message: inference_pb2.Timings) -> Timings:
    """Milliseconds."""
    return Timings(queue_ms=message.queue_ms, ttft_ms=message.ttft_ms, tpot_ms=message.tpot_ms, total_ms=message.total_ms)


def reason_of(value: inference_pb2.FinishReason) -> FinishReason:
    """Why a choice ended; one that was not said is an error."""
    return cast(FinishReason, inference_pb2.FinishReason.Name(value)) if value else "error"


def error_of(message: inference_pb2.Error) -> RequestError:
    """The error of a failed result."""
    if message.code not in CODES:
        return RequestError("internal", f"ended with a code that this version does not know: {message.code[:64]}")
    return RequestError(message.code, message.message, field=message.field)


def ending_of(result: inference_pb2.Result) -> Finished | Failed:
    """The terminal event that a terminal record stands for."""
    choices = tuple(
        ChoiceResult(
            index=choice.index,
            text=choice.text,
            token_ids=tuple(choice.token_ids),
            finish_reason=reason_of(choice.finish_reason),
            logprobs=logprobs_from_proto(choice.logprobs) if choice.logprobs else None,
        )
        for choice in result.choices
    )
    usage, timings = usage_of(result.usage), timings_of(result.timings)
    if result.HasField("error"):
        return Failed(
            error=error_of(result.error),
            choices=choices,
            usage=usage,
            timings=timings,
            seed=result.seed,
            trace_id=result.trace_id,
        )
    return Finished(choices=choices, usage=usage, timings=timings, seed=result.seed, trace_id=result.trace_id)
