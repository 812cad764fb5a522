"""Decode tokens a second at several batch sizes, Sluice's engine and transformers' generate in one interleaved run.

    python -m tests.bench.decode [--batches 1,8,32] [--prompt-tokens 32] [--new-tokens 32] [--blocks 3] [--dtype bfloat16]

Both get the same random prompts, are greedy, ignore the end of sequence and use the same threads. A block times a run of
`new-tokens` and a run of one token; the rate is the difference, so that prefill does not count. Who begins changes from block to block.
`generate` has the type in which it is faster on this processor, as in `make bench-peers`. Here both share a process, and with it how
OpenMP's threads wait (`make bench` has them sleep soon); there each has a process and waits of its own: that is the comparison to cite.
"""

import argparse
import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM

from engine import Engine, EngineConfig, Request, SamplingParams
from service.cli.demo_model import ensure_demo_model
from tests.bench import report
from tests.bench.peers import machine
from tests.bench.peers.catalogue import CATALOGUE, default_systems

System = TypeVar("System")


def peer_dtype() -> str:
    """What `make bench-peers` runs transformers in on this processor."""
    names = default_systems(machine.description()["instruction_sets"])
    [name] = [name for name in names if name.startswith("transformers-")]
    return str(CATALOGUE[name].options.get("dtype", "bfloat16"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--batches", type=report.counts, default="1,8,32")
    parser.add_argument("--prompt-tokens", type=report.at_least(1), default=32)
    parser.add_argument("--new-tokens", type=report.at_least(2), default=32)
    parser.add_argument("--blocks", type=report.at_least(1), default=3)
    parser.add_argument("--dtype", default="bfloat16", help="of Sluice")
    parser.add_argument("--peer-dtype", default=peer_dtype(), help="of transformers; by this processor %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Ours:
    """The whole engine: scheduler, sampler and all."""

    def __init__(self, model_dir: str, dtype: str) -> None:
        self._engine = Engine(
            EngineConfig(model_dir=model_dir, dtype=dtype, enable_prefix_cache=False, max_num_batched_tokens=2048)  # type: ignore[arg-type]
        )
        self.num_threads = self._engine.facts.num_threads
        self._runs = 0

    def run(self, prompts: list[list[int]], new_tokens: int) -> None:
        self._runs += 1
        sampling = SamplingParams(max_tokens=new_tokens, seed=0, temperature=0.0, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            self._engine.add(Request(request_id=f"{self._runs}-{i}", prompt_token_ids=tuple(prompt), sampling=sampling))
        said = 0
        while said < new_tokens * len(prompts):
            said += sum(len(output.token_ids) for output in self._engine.step().every())


class Transformers:
    """`generate` with its default cache."""

    def __init__(self, model_dir: str, dtype: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()
        # No end of sequence: asking for as many tokens at least would add a step of processing to each.
        self._model.generation_config.eos_token_id = None

    def run(self, prompts: list[list[int]], new_tokens: int) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        if out.shape[1] != ids.shape[1] + new_tokens:
            raise RuntimeError(f"transformers gave {out.shape[1] - ids.shape[1]} tokens, not {new_tokens}")


def decode_rate(system: Ours | Transformers, prompts: list[list[int]], new_tokens: int) -> float:
    whole = report.seconds(lambda: system.run(prompts, new_tokens))
    first = report.seconds(lambda: system.run(prompts, 1))
    return len(prompts) * (new_tokens - 1) / max(1e-9, whole - first)


def in_turn(systems: Sequence[System], block: int) -> Sequence[System]:
    """Those of even blocks as they are, those of odd ones the other way round."""
    return systems if block % 2 == 0 else systems[::-1]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    began = report.environment()
    model_dir = arguments.model or str(ensure_demo_model())
    ours, peer = Ours(model_dir, arguments.dtype), Transformers(model_dir, arguments.peer_dtype)
    torch.set_num_threads(ours.num_threads)
    systems: tuple[tuple[str, Ours | Transformers], ...] = (("sluice", ours), ("transformers", peer))
    draw = random.Random(arguments.seed)
    results: dict[str, Any] = {}
    for batch in (int(size) for size in arguments.batches.split(",")):
        prompts = [[draw.randrange(1000, 40_000) for _ in range(arguments.prompt_tokens)] for _ in range(batch)]
        for system in (ours, peer):
            system.run(prompts, 2)
        rates: dict[str, list[float]] = {"sluice": [], "transformers": []}
        for block in range(arguments.blocks):
            for name, system in in_turn(systems, block):
                rates[name].append(decode_rate(system, prompts, arguments.new_tokens))
        ratios = [mine / theirs for mine, theirs in zip(rates["sluice"], rates["transformers"], strict=True)]
        results[f"batch_{batch}"] = {
            "tokens_per_s": {name: report.spread(values) for name, values in rates.items()},
            "ratio": report.spread(ratios),
        }
    return report.emit(
        "decode",
        vars(arguments) | {"model": "SmolLM2-135M-Instruct" if not arguments.model else "given"},
        results | {"probe": report.probe()},
        began,
    )


if __name__ == "__main__":
    report.print_report(measure(parse()))
