"""Sluice's `Engine`, stepped in this process: scheduler, sampler and all."""

import gc
from dataclasses import asdict, fields
from typing import Any

from speaking import Recorder, serve

from engine import Engine, EngineConfig, Request, SamplingParams


class Sluice:
    def __init__(self, options: dict[str, Any]) -> None:
        wanted = {"model_dir": options["model_dir"], "num_threads": options["threads"], **options.get("config", {})}
        unknown = set(wanted) - {field.name for field in fields(EngineConfig)}
        if unknown:
            raise LookupError(f"this engine has no setting {', '.join(sorted(unknown))}")
        self._engine = Engine(EngineConfig(**wanted))
        # As the engine's child does (vLLM's does, too): what loading left behind is not looked through again.
        gc.collect()
        gc.freeze()
        self._runs = 0

    def facts(self) -> dict[str, Any]:
        return asdict(self._engine.facts)

    def run(self, case: str, prompts: list[list[int]], new_tokens: int, keep: bool, recorder: Recorder) -> list[list[int]]:
        # The prefix cache keeps what may be kept: the prompts are the same the next time.
        self._runs += 1
        sampling = SamplingParams(max_tokens=new_tokens, seed=0, temperature=0.0, ignore_eos=True)
        said: list[list[int]] = [[] for _ in prompts]
        for i, prompt in enumerate(prompts):
            self._engine.add(Request(request_id=f"{self._runs}-{i}", prompt_token_ids=tuple(prompt), sampling=sampling))
        ended = 0
        while ended < len(prompts):
            outputs = self._engine.step().every()
            recorder.step({int(output.request_id.split("-")[1]): len(output.token_ids) for output in outputs})
            for output in outputs:
                said[int(output.request_id.split("-")[1])] += output.token_ids
                ended += output.finish_reason is not None
        return said


if __name__ == "__main__":
    serve(Sluice)
