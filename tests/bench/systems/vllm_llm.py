"""vLLM's engine on a CPU, by its `LLM` class: engine core in a process of its own, prefix cache on, eager unless `eager` is False."""

import os
from typing import Any

import torch
import vllm
from speaking import Recorder, serve
from vllm import LLM, SamplingParams


class Vllm:
    def __init__(self, options: dict[str, Any]) -> None:
        self._llm = LLM(
            options["model_dir"],
            dtype=options.get("dtype", "bfloat16"),
            enforce_eager=options.get("eager", True),
            max_model_len=2048,
            max_num_seqs=64,
            seed=0,
        )
        self._options = options
        self._runs = 0

    def facts(self) -> dict[str, Any]:
        # vLLM adds to it where it brings libraries of its own.
        preloaded = [os.path.basename(file) for file in os.environ.get("LD_PRELOAD", "").replace(" ", ":").split(":") if file]
        return {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "dtype": self._options.get("dtype", "bfloat16"),
            "eager": self._options.get("eager", True),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "engine_process": os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "1",
            "preload": ", ".join(preloaded),
            "tcmalloc": any(file.startswith("libtcmalloc") for file in preloaded),
        }

    def run(self, case: str, prompts: list[list[int]], new_tokens: int, keep: bool, recorder: Recorder) -> list[list[int]]:
        self._runs += 1
        engine = self._llm.llm_engine
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        said: list[list[int]] = [[] for _ in prompts]
        for i, prompt in enumerate(prompts):
            engine.add_request(f"{self._runs}-{i}", {"prompt_token_ids": prompt}, sampling)
        while engine.has_unfinished_requests():
            gained = {}
            for output in engine.step():
                i = int(output.request_id.split("-")[1])
                tokens = list(output.outputs[0].token_ids)
                gained[i] = len(tokens) - len(said[i])
                said[i] = tokens
            recorder.step(gained)
        return said


def load(options: dict[str, Any]) -> Vllm:
    return Vllm(options)


if __name__ == "__main__":
    serve(load)
