"""A Sluice replica over gRPC, through the client library: one `Stream` a request."""

import contextlib
from typing import Any

from service.bench.target import TEMPERATURE, Answer, OnTokens, TargetError
from service.bench.workload import Planned
from service.contract import Delta, Finished, PromptRequest, SamplingFields
from service.errors import SetupError
from service.rpc.client import Backoff, SluiceClient
from service.rpc.client_errors import SluiceError


class GrpcTarget:
    """`address`: host:port. A broken stream is an error of the run, not taken up again in silence."""

    def __init__(self, address: str, *, model: str = "", ignore_eos: bool = True) -> None:
        self._address = address
        self._model = model
        self._ignore_eos = ignore_eos
        self._client: SluiceClient | None = None

    async def open(self) -> dict[str, Any]:
        client = self._client = SluiceClient(self._address, backoff=Backoff(attempts=1))
        try:
            await client.health()
            models = await client.models()
        except SluiceError as error:
            raise SetupError(
                f"no replica answers at {self._address} ({error.message}); start one (`make serve`), or name yours with --target",
                exit_code=3,
            ) from error
        return {"target": f"grpc://{self._address}", "models": [model.name for model in models]}

    async def ask(self, planned: Planned, on_tokens: OnTokens) -> Answer:
        assert self._client is not None
        sampling = SamplingFields(
            max_tokens=planned.max_tokens, temperature=TEMPERATURE, seed=planned.seed, ignore_eos=self._ignore_eos or None
        )
        prompt = PromptRequest(text=planned.text, model=self._model, sampling=sampling)
        try:
            async with self._client.stream(prompt) as events:
                async for event in events:
                    if isinstance(event, Delta):
                        if event.token_ids:
                            on_tokens(len(event.token_ids))
                    elif isinstance(event, Finished):
                        return Answer(
                            prompt_tokens=event.usage.prompt_tokens,
                            completion_tokens=event.usage.completion_tokens,
                            cached_prompt_tokens=event.usage.cached_prompt_tokens,
                            engine_ttft_s=(event.timings.ttft_ms - event.timings.queue_ms) / 1e3,
                        )
        except SluiceError as error:
            raise TargetError(error.code, error.message) from error
        raise TargetError("internal", "the stream ended without a result")

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(SluiceError):
                await client.close()
