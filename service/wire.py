"""The shared codec of the transports: bytes and protobuf to `service.contract` types, and their events back to protobuf and JSON.

Guarantees: reading ends in a checked `PromptRequest` or a `RequestError`; writing never fails for a value of the contract.
Unknown and duplicate JSON keys are refused by name. Unknown fields of *binary* protobuf are ignored, as protobuf defines
forward compatibility: an older service serves a newer client's prompt without the fields that it does not know.
Knows no transport: headers, metadata and status codes are theirs.
"""

from collections.abc import Iterable

from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from schemas.v1 import events_pb2, inference_pb2
from service import contract
from service.contract import PromptRequest, SamplingFields
from service.errors import RequestError
from service.wire_json import prompt_from_json
from service.wire_json_out import message_to_json
from service.wire_limits import check

JSON = "application/json"
PROTOBUF = "application/x-protobuf"

_OPTIONAL_SAMPLING = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "ignore_eos", "logprobs", "n", "seed",
)  # fmt: skip


def media_type(content_type: str) -> str:
    """`JSON` or `PROTOBUF`; empty means JSON. Raises `RequestError` (`unsupported_content_type`)."""
    kind, _, parameters = content_type.partition(";")
    kind = kind.strip().lower()
    if kind in ("", JSON):
        charset = parameters.strip().lower().replace(" ", "").replace('"', "")
        if not charset or charset in ("charset=utf-8", "charset=utf8"):
            return JSON
    elif kind == PROTOBUF:
        return PROTOBUF
    raise RequestError("unsupported_content_type", f"only {JSON} (UTF-8) and {PROTOBUF} are read", field="content-type")


def prompt_from_bytes(value: bytes, content_type: str = "") -> PromptRequest:
    """The checked prompt in `value`. Raises `RequestError` with the code and the field at fault."""
    if media_type(content_type) == JSON:
        return check(prompt_from_json(value))
    message = inference_pb2.Prompt()
    try:
        message.ParseFromString(value)
    except DecodeError:
        raise RequestError("invalid_protobuf", "does not parse as sluice.v1.Prompt") from None
    return prompt_from_proto(message)


def prompt_from_proto(message: inference_pb2.Prompt) -> PromptRequest:
    """The checked prompt in `message`. Raises `RequestError` (`invalid_field`)."""
    given = message.WhichOneof("input")
    return check(
        PromptRequest(
            text=message.prompt if given == "prompt" else None,
            messages=tuple((item.role, item.content) for item in message.messages.items) if given == "messages" else None,
            token_ids=tuple(message.token_ids.ids) if given == "token_ids" else None,
            model=message.model,
            sampling=_sampling_from_proto(message.sampling),
            label=message.label,
            ttl_ms=message.ttl_ms,
            metadata=dict(message.metadata),
        )
    )


def _sampling_from_proto(message: inference_pb2.Sampling) -> SamplingFields:
    given = {name: getattr(message, name) for name in _OPTIONAL_SAMPLING if message.HasField(name)}
    return SamplingFields(
        logit_bias=dict(message.logit_bias), stop=tuple(message.stop), stop_token_ids=tuple(message.stop_token_ids), **given
    )


def prompt_to_proto(request: PromptRequest) -> inference_pb2.Prompt:
    """The message that says `request`; `prompt_from_proto` gives it back. Raises ValueError for numbers that no field holds."""
    sampling = inference_pb2.Sampling(
        logit_bias=request.sampling.logit_bias,
        stop=request.sampling.stop,
        stop_token_ids=request.sampling.stop_token_ids,
        **{name: value for name in _OPTIONAL_SAMPLING if (value := getattr(request.sampling, name)) is not None},
    )
    message = inference_pb2.Prompt(
        model=request.model, sampling=sampling, label=request.label, ttl_ms=request.ttl_ms, metadata=request.metadata
    )
    if request.text is not None:
        message.prompt = request.text
    elif request.messages is not None:
        message.messages.SetInParent()
        message.messages.items.extend(inference_pb2.ChatMessage(role=role, content=text) for role, text in request.messages)
    elif request.token_ids is not None:
        message.token_ids.SetInParent()
        message.token_ids.ids.extend(request.token_ids)
    return message


def timestamp(time_ns: int) -> Timestamp:
    """`time_ns` since the epoch as a protobuf timestamp."""
    return Timestamp(seconds=time_ns // 1_000_000_000, nanos=time_ns % 1_000_000_000)


def error_to_proto(error: RequestError) -> inference_pb2.Error:
    """The error as every surface shows it."""
    return inference_pb2.Error(code=error.code, message=error.message, field=error.field, retriable=error.info.retriable)


def logprobs_to_proto(entries: tuple[contract.LogprobEntry, ...] | None) -> list[inference_pb2.TokenLogprobs]:
    """One message a token; none where they were not asked for."""
    return [
        inference_pb2.TokenLogprobs(
            token_id=entry.token_id,
            token=entry.token,
            logprob=entry.logprob,
            top=[inference_pb2.TopLogprob(token_id=i, token=text, logprob=logprob) for i, text, logprob in entry.top],
        )
        for entry in entries or ()
    ]


def logprobs_from_proto(entries: Iterable[inference_pb2.TokenLogprobs]) -> tuple[contract.LogprobEntry, ...]:
    """What `logprobs_to_proto` had said."""
    return tuple(
        contract.LogprobEntry(
            token_id=entry.token_id,
            token=entry.token,
            logprob=entry.logprob,
            top=tuple((top.token_id, top.token, top.logprob) for top in entry.top),
        )
        for entry in entries
    )


def usage_to_proto(usage: contract.Usage) -> inference_pb2.Usage:
    """Token counts."""
    return inference_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        completion_tokens=usage.completion_tokens,
    )


def timings_to_proto(timings: contract.Timings) -> inference_pb2.Timings:
    """Milliseconds."""
    return inference_pb2.Timings(
        queue_ms=timings.queue_ms, ttft_ms=timings.ttft_ms, tpot_ms=timings.tpot_ms, total_ms=timings.total_ms
    )


def delta_to_proto(delta: contract.Delta) -> inference_pb2.Delta:
    """The stream's delta; its `seq` stands on the `StreamEvent`."""
    return inference_pb2.Delta(
        choice=delta.choice,
        token_ids=delta.token_ids,
        text=delta.text,
        text_offset=delta.text_offset,
        logprobs=logprobs_to_proto(delta.logprobs),
        finish_reason=delta.finish_reason,
    )


def event_to_proto(request_id: str, event: contract.ReaderEvent, *, said: int = 0, epoch: int = 0) -> inference_pb2.StreamEvent:
    """One event of a stream. `said`: tokens said so far over all choices, the `seq` of events that are no delta."""
    message = inference_pb2.StreamEvent(request_id=request_id, seq=said, epoch=epoch)
    if isinstance(event, contract.Started):
        message.started.CopyFrom(
            inference_pb2.StreamStarted(
                seed=event.seed, model=event.model, prompt_tokens=event.prompt_tokens, trace_id=event.trace_id
            )
        )
    elif isinstance(event, contract.Delta):
        message.seq = event.seq
        message.delta.CopyFrom(delta_to_proto(event))
    elif isinstance(event, contract.Reset):
        message.reset.resume_from.extend(event.resume_from)
    elif isinstance(event, contract.Finished):
        message.finished.CopyFrom(
            inference_pb2.Finished(
                choices=[
                    inference_pb2.ChoiceEnd(
                        index=choice.index,
                        finish_reason=choice.finish_reason,
                        text_length=len(choice.text),
                    )
                    for choice in event.choices
                ],
                usage=usage_to_proto(event.usage),
                timings=timings_to_proto(event.timings),
                trace_id=event.trace_id,
                seed=event.seed,
            )
        )
    else:
        message.failed.CopyFrom(error_to_proto(event.error))
    return message


def choice_to_proto(choice: contract.ChoiceResult) -> inference_pb2.Choice:
    """One whole continuation."""
    return inference_pb2.Choice(
        index=choice.index,
        text=choice.text,
        token_ids=choice.token_ids,
        finish_reason=choice.finish_reason,
        logprobs=logprobs_to_proto(choice.logprobs),
    )


def result_to_proto(
    event: contract.Finished | contract.Failed,
    *,
    request_id: str,
    time_ns: int,
    label: str = "",
    model: str = "",
    source: contract.Source | None = None,
    epoch: int = 0,
    attempt: int = 1,
) -> inference_pb2.Result:
    """The terminal record of a request that was accepted."""
    result = inference_pb2.Result(
        request_id=request_id,
        label=label,
        model=model,
        status=_failure(event.error) if isinstance(event, contract.Failed) else inference_pb2.Result.finished,
        choices=[choice_to_proto(choice) for choice in event.choices],
        usage=usage_to_proto(event.usage),
        timings=timings_to_proto(event.timings),
        seed=event.seed,
        epoch=epoch,
        attempt=attempt,
        trace_id=event.trace_id,
        time=timestamp(time_ns),
    )
    if isinstance(event, contract.Failed):
        result.error.CopyFrom(error_to_proto(event.error))
    if source is not None:
        result.source.CopyFrom(source_to_proto(source))
    return result


def refusal_to_proto(
    error: RequestError,
    *,
    request_id: str,
    time_ns: int,
    label: str = "",
    model: str = "",
    trace_id: str = "",
    source: contract.Source | None = None,
    epoch: int = 0,
    attempt: int = 1,
) -> inference_pb2.Result:
    """The terminal record of a request that was never accepted."""
    return inference_pb2.Result(
        request_id=request_id,
        label=label,
        model=model,
        status=_failure(error),
        error=error_to_proto(error),
        epoch=epoch,
        attempt=attempt,
        trace_id=trace_id,
        source=None if source is None else source_to_proto(source),
        time=timestamp(time_ns),
    )


def _failure(error: RequestError) -> inference_pb2.Result.Status:
    return inference_pb2.Result.cancelled if error.code == "cancelled" else inference_pb2.Result.failed


def source_to_proto(source: contract.Source) -> inference_pb2.Source:
    """Where the prompt record stands."""
    return inference_pb2.Source(topic=source.topic, partition=source.partition, offset=source.offset)


def chunk_to_proto(
    delta: contract.Delta, *, request_id: str, time_ns: int, epoch: int = 0, attempt: int = 1
) -> events_pb2.Chunk:
    """The chunk record that says `delta`."""
    return events_pb2.Chunk(
        request_id=request_id,
        choice=delta.choice,
        epoch=epoch,
        attempt=attempt,
        seq=delta.seq,
        token_ids=delta.token_ids,
        text=delta.text,
        text_offset=delta.text_offset,
        logprobs=logprobs_to_proto(delta.logprobs),
        time=timestamp(time_ns),
    )


def to_bytes(message: Message, kind: str = JSON) -> bytes:
    """`message` as `kind` (`JSON` or `PROTOBUF`). JSON: the canonical mapping in snake_case (64-bit integers are strings)."""
    if kind == PROTOBUF:
        return message.SerializeToString()
    return message_to_json(message)
