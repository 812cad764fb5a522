"""What the engine's benchmarks on a GPU share: one engine of random weights, prompts that share nothing, and steps that are timed."""

import itertools
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine import Engine, EngineConfig, Request, SamplingParams
from engine.execution.captured_steps import CapturedSteps

Figures = dict[str, Any]
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


class Bench:
    """One engine, and prompts that share nothing."""

    def __init__(self, model_dir: str, kv_cache_bytes: int, **settings: Any) -> None:
        began = time.perf_counter()
        self.engine = Engine(
            EngineConfig(
                model_dir=model_dir,
                load_format="dummy",
                dtype="bfloat16",
                device="cuda:0",
                kv_cache_bytes=kv_cache_bytes,
                max_num_seqs=256,
                max_num_batched_tokens=8192,
                **{"enable_prefix_cache": False} | settings,
            )
        )
        self.load_s = time.perf_counter() - began
        self.decoded = 0
        """Tokens that decodes have computed."""
        self._ids = itertools.count()
        self._draw = random.Random(0)

    def prompt(self, length: int) -> tuple[int, ...]:
        return tuple(self._draw.randrange(3, 128_000) for _ in range(length))

    def add(self, prompt: tuple[int, ...], max_tokens: int, **how: Any) -> str:
        name = str(next(self._ids))
        sampling = SamplingParams(**{"max_tokens": max_tokens, "seed": 1, "temperature": 0.0, "ignore_eos": True} | how)
        self.engine.add(Request(request_id=name, prompt_token_ids=prompt, sampling=sampling))
        return name

    def step(self) -> tuple[float, Any]:
        """(seconds, stats) of one step."""
        began = time.perf_counter()
        output = self.engine.step()
        took = time.perf_counter() - began
        self.decoded += output.stats.num_decode_tokens
        return took, output.stats

    def fill(self, batch: int, context: int, max_tokens: int, **how: Any) -> list[str]:
        """`batch` sequences of `context` tokens, prefilled; returns when all of them decode."""
        names = [self.add(self.prompt(context), max_tokens, **how) for _ in range(batch)]
        for _ in range(100_000):
            _, stats = self.step()
            if stats.num_decode_tokens == batch:
                return names
        raise RuntimeError("the batch never came to decode whole")

    def empty(self, names: list[str]) -> None:
        for name in names:
            self.engine.abort(name)
        while self.engine.has_work:
            self.engine.step()


def median_ms(values: list[float]) -> float:
    return 1e3 * statistics.median(values)


@contextmanager
def without_graphs() -> Iterator[None]:
    logits, hidden = CapturedSteps.logits, CapturedSteps.hidden
    CapturedSteps.logits = CapturedSteps.hidden = lambda self, batch: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        CapturedSteps.logits, CapturedSteps.hidden = logits, hidden  # type: ignore[method-assign]


def times_of(bench: Bench, steps: int, settle: int = 2) -> list[float]:
    """Seconds of each of so many steps, after some that do not count."""
    return [bench.step()[0] for _ in range(settle + steps)][settle:]
