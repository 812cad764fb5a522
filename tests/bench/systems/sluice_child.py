"""Sluice's engine as the service drives it: a supervised child process, its tokens over the socket to this parent (uvloop)."""

import asyncio
from dataclasses import asdict
from typing import Any

import uvloop
from speaking import Recorder, serve

from engine import EngineConfig, Request, SamplingParams
from service.config import EngineSection
from service.engine_process import EngineProcess


class SluiceChild:
    def __init__(self, options: dict[str, Any]) -> None:
        config = EngineConfig(model_dir=options["model_dir"], num_threads=options["threads"], **options.get("config", {}))
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._engine = EngineProcess(config, EngineSection())
        self._runner.run(self._engine.start())
        self._outputs = self._engine.outputs()
        self._runs = 0

    def facts(self) -> dict[str, Any]:
        return asdict(self._engine.facts())

    def run(self, case: str, prompts: list[list[int]], new_tokens: int, keep: bool, recorder: Recorder) -> list[list[int]]:
        self._runs += 1
        return self._runner.run(self._run(prompts, new_tokens, recorder))

    async def _run(self, prompts: list[list[int]], new_tokens: int, recorder: Recorder) -> list[list[int]]:
        sampling = SamplingParams(max_tokens=new_tokens, seed=0, temperature=0.0, ignore_eos=True)
        said: list[list[int]] = [[] for _ in prompts]
        for i, prompt in enumerate(prompts):
            await self._engine.submit(
                Request(request_id=f"{self._runs}-{i}", prompt_token_ids=tuple(prompt), sampling=sampling)
            )
        ended = 0
        while ended < len(prompts):
            outputs = (await anext(self._outputs)).every()
            recorder.step({int(output.request_id.split("-")[1]): len(output.token_ids) for output in outputs})
            for output in outputs:
                said[int(output.request_id.split("-")[1])] += output.token_ids
                ended += output.finish_reason is not None
        return said


if __name__ == "__main__":
    serve(SluiceChild)
