"""Durable requests over real gRPC, with a fake of what Kafka does: what goes out, what comes back, and how a reader goes on."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import grpc
import pytest

from schemas.v1 import inference_pb2, inference_pb2_grpc
from service.contract import (
    ChoiceResult,
    Delta,
    Failed,
    Finished,
    PromptRequest,
    ReaderEvent,
    Reset,
    SamplingFields,
    Source,
    Started,
    Usage,
)
from service.errors import RequestError
from service.rpc.client import Backoff, CallOptions, SluiceClient, SluiceError
from tests.service.rpc.fakes import TIMINGS, WAIT_S, serving

ID = "t.prompts-0-7"
TRACEPARENT = f"00-{'a' * 32}-{'b' * 16}-01"
QUICK = Backoff(first_s=0.001, most_s=0.01, attempts=50)
TOKENS = 10


class FakeAttached:
    """Says tokens 0 … from the reader's own on; waits where its owner holds it."""

    def __init__(self, owner: "FakeDurable", after: Sequence[int]) -> None:
        self.traceparent = TRACEPARENT
        self.here = owner.here
        self.closed = False
        self._owner = owner
        self._after = after[0] if after else 0

    def __aiter__(self) -> AsyncIterator[ReaderEvent]:
        return self._events()

    async def aclose(self) -> None:
        self.closed = True

    async def _events(self) -> AsyncIterator[ReaderEvent]:
        yield Started(request_id=ID, model="m", seed=7, prompt_tokens=3, trace_id="a" * 32, epoch=1)
        for seq in range(self._after, TOKENS):
            if seq == self._owner.hold_at:
                await asyncio.Event().wait()
            if seq == self._owner.hand_over_at:
                yield Reset(epoch=2, resume_from=(seq,))
            yield Delta(choice=0, seq=seq, token_ids=(seq,), text="x", text_offset=seq)
        usage = Usage(prompt_tokens=3, cached_prompt_tokens=0, completion_tokens=TOKENS)
        if self._owner.failure is not None:
            yield Failed(error=self._owner.failure, choices=(), usage=usage, timings=TIMINGS, seed=7, trace_id="")
            return
        choice = ChoiceResult(index=0, text="x" * TOKENS, token_ids=tuple(range(TOKENS)), finish_reason="stop")
        yield Finished(choices=(choice,), usage=usage, timings=TIMINGS, seed=7, trace_id="a" * 32)


class FakeDurable:
    """`Durable` with one request."""

    def __init__(self) -> None:
        self.here = False
        self.hold_at = self.hand_over_at = -1
        self.failure: RequestError | None = None
        self.refusals: list[RequestError] = []
        self.submitted: list[tuple[PromptRequest, str, str, str, dict[str, bytes]]] = []
        self.attached: list[FakeAttached] = []
        self.cancelled: list[str] = []

    def owns(self, request_id: str) -> bool:
        return request_id.startswith("t.")

    async def submit(
        self,
        prompt: PromptRequest,
        *,
        key: str,
        queue_class: str,
        conversation_id: str,
        headers: tuple[tuple[str, bytes], ...],
    ) -> Source:
        self._refuse()
        self.submitted.append((prompt, key, queue_class, conversation_id, dict(headers)))
        return Source(topic="t.prompts", partition=0, offset=7)

    async def get(self, request_id: str) -> inference_pb2.Result:
        self._refuse()
        return inference_pb2.Result(request_id=request_id, status=inference_pb2.Result.pending)

    async def attach(self, request_id: str, after: Sequence[int], after_text: Sequence[int]) -> FakeAttached:
        self._refuse()
        self.after_text = tuple(after_text)
        self.attached.append(FakeAttached(self, after))
        return self.attached[-1]

    async def cancel(self, request_id: str) -> bool:
        self.cancelled.append(request_id)
        return True

    def _refuse(self) -> None:
        if self.refusals:
            raise self.refusals.pop(0)


async def tokens_of(client: SluiceClient, after: Sequence[int] = ()) -> list[int]:
    async with asyncio.timeout(WAIT_S), client.attach(ID, after) as events:
        return [token async for event in events if isinstance(event, Delta) for token in event.token_ids]


async def test_submit_hands_the_prompt_its_key_class_and_headers_on() -> None:
    durable = FakeDurable()
    async with serving(durable=durable) as service, SluiceClient(service.target) as client:
        options = CallOptions(
            conversation_id="c", correlation_id="r", idempotency_key="i", tenant="not trusted", traceparent=TRACEPARENT
        )
        sampling = SamplingFields(max_tokens=3)
        assert await client.submit("hello", sampling=sampling, key="k", queue_class="batch", options=options) == ID
        (send,) = await service.spans("send prompts")
        (call,) = await service.spans("sluice.v1.Inference/Submit")
    ((prompt, key, queue_class, conversation_id, headers),) = durable.submitted
    assert (prompt.text, prompt.sampling.max_tokens, key, queue_class, conversation_id) == ("hello", 3, "k", "batch", "c")
    traceparent = headers.pop("traceparent").decode()
    assert headers == {"sluice-conversation-id": b"c", "correlation-id": b"r", "sluice-idempotency-key": b"i"}
    assert traceparent == f"00-{'a' * 32}-{send.context.span_id:016x}-01"
    assert (send.parent.span_id, call.attributes["sluice.request.id"]) == (call.context.span_id, ID)


async def test_a_prompt_out_of_range_is_refused_before_it_is_written() -> None:
    durable = FakeDurable()
    async with serving(durable=durable) as service, SluiceClient(service.target) as client:
        with pytest.raises(SluiceError) as caught:
            await client.submit("hello", sampling=SamplingFields(temperature=9.0))
    assert (caught.value.code, caught.value.field, durable.submitted) == ("invalid_field", "sampling.temperature", [])


async def test_an_attached_reader_is_linked_to_the_generation_and_told_of_a_hand_over() -> None:
    durable = FakeDurable()
    durable.hand_over_at = 4
    async with serving(durable=durable, coalesce_ms=0) as service, grpc.aio.insecure_channel(service.target) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Attach(inference_pb2.AttachRequest(request_id=ID))
        events = [event async for event in call]
        (span,) = await service.spans("sluice.v1.Inference/Attach")
    said = [token for event in events for token in event.delta.token_ids]
    resets = [(event.epoch, list(event.reset.resume_from)) for event in events if event.HasField("reset")]
    assert (said, resets) == (list(range(TOKENS)), [(2, [4])])
    assert {event.epoch for event in events if event.seq > 4} == {2}
    assert [f"{link.context.trace_id:032x}" for link in span.links] == ["a" * 32]
    assert span.parent is None
    assert durable.attached[0].closed


@pytest.mark.parametrize("code", ["broker_unavailable", "draining", "overloaded"])
async def test_a_reader_comes_back_after_what_passes(code) -> None:  # type: ignore[no-untyped-def]
    durable = FakeDurable()
    durable.refusals = [RequestError(code, "for now"), RequestError(code, "for now")]
    async with serving(durable=durable) as service, SluiceClient(service.target, backoff=QUICK) as client:
        assert await tokens_of(client) == list(range(TOKENS))


async def test_a_reader_goes_on_at_another_replica_when_its_own_is_stopped() -> None:
    held, other = FakeDurable(), FakeDurable()
    held.hold_at = 6
    async with serving(durable=other) as second:
        async with serving(durable=held, coalesce_ms=0) as first:
            client = SluiceClient([first.target, second.target], backoff=QUICK)
            events = client.attach(ID)
            said: list[int] = []
            while len(said) < 6:
                event = await asyncio.wait_for(anext(events), WAIT_S)
                said += event.token_ids if isinstance(event, Delta) else ()
            # What is read from elsewhere is not held until the grace is over.
            await asyncio.wait_for(first.server.stop(60.0), WAIT_S)
        async with client, asyncio.timeout(WAIT_S):
            said += [token async for event in events if isinstance(event, Delta) for token in event.token_ids]
    assert said == list(range(TOKENS))
    assert [stream._after for stream in other.attached] == [6]
    assert other.after_text == (6,)


async def test_what_the_request_itself_ended_with_is_final() -> None:
    durable = FakeDurable()
    durable.failure = RequestError("engine_failed", "it could not be restarted")
    async with serving(durable=durable) as service, SluiceClient(service.target, backoff=QUICK) as client:
        with pytest.raises(SluiceError) as caught:
            await tokens_of(client)
    assert (caught.value.code, len(durable.attached)) == ("engine_failed", 1)


async def test_a_reader_that_leaves_ends_its_reading_and_nothing_else() -> None:
    durable = FakeDurable()
    durable.hold_at = 3
    async with serving(durable=durable, coalesce_ms=0) as service, SluiceClient(service.target) as client:
        async with client.attach(ID) as events:
            async for event in events:
                if isinstance(event, Delta) and event.seq + len(event.token_ids) == 3:
                    break
        await asyncio.wait_for(service.inference.idle(), WAIT_S)
    assert (durable.attached[0].closed, durable.cancelled) == (True, [])


async def test_a_cancel_goes_to_kafka_for_an_id_that_is_kafkas() -> None:
    durable = FakeDurable()
    async with serving(durable=durable) as service, SluiceClient(service.target) as client:
        assert await client.cancel(ID)
        assert not await client.cancel("0190c6ae-0000-7000-8000-000000000000")
    assert durable.cancelled == [ID]


async def test_an_answer_is_asked_of_the_next_replica_when_one_is_away() -> None:
    async with serving(durable=FakeDurable()) as service, SluiceClient(["127.0.0.1:1", service.target]) as client:
        assert (await client.get(ID)).status == inference_pb2.Result.pending
        assert await client.submit("hello") == ID
    with pytest.raises(SluiceError) as caught:
        async with SluiceClient(["127.0.0.1:1", "127.0.0.1:2"]) as client:
            await client.get(ID)
    assert caught.value.code == "unavailable"


@pytest.mark.parametrize(
    ("request_id", "after", "field"),
    [
        ("", (), "request_id"),
        ("x" * 600, (), "request_id"),
        (ID, (0,) * 17, "after_seq"),
        (ID, (2**64 - 1, 1), "after_seq"),
    ],
)
async def test_bad_questions_name_the_field(request_id, after, field) -> None:  # type: ignore[no-untyped-def]
    async with serving(durable=FakeDurable()) as service, grpc.aio.insecure_channel(service.target) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Attach(
            inference_pb2.AttachRequest(request_id=request_id, after_seq=after)
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call.read(), WAIT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"invalid_field: {field}" in caught.value.details()
