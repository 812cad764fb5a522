"""An engine without a process: the test says what it says, a step at a time."""

import asyncio
from collections.abc import AsyncIterator

from engine import EngineFacts, FinishReason, Request, SequenceFacts, StepOutput, StepStats, TokenLogprobs, TokenOutput

FACTS = EngineFacts(
    model="tiny",
    architecture="Fake",
    dtype="none",
    kv_cache_dtype="none",
    device="none",
    operators="none",
    operators_reason="a stand-in computes nothing",
    quantize="",
    attention_backend="none",
    max_model_len=512,
    vocab_size=266,
    hidden_size=0,
    num_blocks=64,
    block_size=16,
    max_num_seqs=8,
    max_num_batched_tokens=128,
    eos_token_ids=(2,),
    num_parameters=0,
    weight_bytes=0,
    kv_cache_bytes=0,
    load_s=0.0,
    num_threads=1,
    pid=0,
)


def stats(step: int) -> StepStats:
    names = [name for name in StepStats.__dataclass_fields__ if name != "step"]
    return StepStats(step=step, **dict.fromkeys(names, 0))


def facts(first_scheduled_ns: int, first_token_ns: int, last_token_ns: int, *, cached: int = 0) -> SequenceFacts:
    return SequenceFacts(
        num_prompt_tokens=5,
        num_cached_tokens=cached,
        num_output_tokens=1,
        num_prefill_chunks=1,
        num_steps=3,
        num_preemptions=0,
        num_blocks=1,
        added_ns=first_scheduled_ns,
        first_scheduled_ns=first_scheduled_ns,
        first_token_ns=first_token_ns,
        last_token_ns=last_token_ns,
    )


class FakeEngine:
    """An `EngineClient`. Aborted requests end with `cancelled` unless `deaf`."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self.aborted: list[str] = []
        self.deaf = False
        self.submit_error: Exception | None = None
        self._said: dict[tuple[str, int], int] = {}
        self._ended: set[tuple[str, int]] = set()
        self._outputs: asyncio.Queue[StepOutput | None] = asyncio.Queue()
        self._step = 0

    async def start(self) -> None:
        return

    async def submit(self, request: Request) -> None:
        if self.submit_error is not None:
            raise self.submit_error
        self.requests[request.request_id] = request
        for choice, said in enumerate(request.output_token_ids):
            self._said[request.request_id, choice] = len(said)

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        if self.deaf or request_id not in self.requests:
            return
        for choice in range(self.requests[request_id].sampling.n):
            if (request_id, choice) not in self._ended:
                self.say(request_id, choice=choice, finish="cancelled")

    def facts(self) -> EngineFacts:
        return FACTS

    async def outputs(self) -> AsyncIterator[StepOutput]:
        while (step := await self._outputs.get()) is not None:
            yield step

    async def close(self) -> None:
        self._outputs.put_nowait(None)

    def say(
        self,
        request_id: str,
        *token_ids: int,
        choice: int = 0,
        finish: FinishReason | None = None,
        stop_token_id: int | None = None,
        error: tuple[str, str] = ("", ""),
        logprobs: tuple[TokenLogprobs, ...] | None = None,
        facts: SequenceFacts | None = None,
    ) -> None:
        """One step with one output."""
        key = (request_id, choice)
        seq = self._said.get(key, 0)
        self._said[key] = seq + len(token_ids)
        if finish is not None:
            self._ended.add(key)
        self._step += 1
        output = TokenOutput(
            request_id=request_id,
            choice=choice,
            seq=seq,
            token_ids=token_ids,
            finish_reason=finish,
            stop_token_id=stop_token_id,
            error_code=error[0],
            error_message=error[1],
            logprobs=logprobs,
            facts=facts,
        )
        self._outputs.put_nowait(StepOutput(outputs=(output,), stats=stats(self._step)).packed())
