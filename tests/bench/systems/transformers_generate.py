"""transformers' `generate` with its default cache and attention."""

from typing import Any

import torch
import transformers
from speaking import Recorder, serve
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class _Tell(StoppingCriteria):
    """Told after every step; never stops."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._recorder.step(dict.fromkeys(range(input_ids.shape[0]), 1))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Transformers:
    def __init__(self, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["threads"])
        dtype = getattr(torch, options.get("dtype", "bfloat16"))
        self._model = AutoModelForCausalLM.from_pretrained(options["model_dir"], dtype=dtype).eval()
        self._model.generation_config.eos_token_id = None

    def facts(self) -> dict[str, Any]:
        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "attention": self._model.config._attn_implementation,
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }

    def run(self, case: str, prompts: list[list[int]], new_tokens: int, keep: bool, recorder: Recorder) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([_Tell(recorder)]),
            )
        said: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return said


if __name__ == "__main__":
    serve(Transformers)
