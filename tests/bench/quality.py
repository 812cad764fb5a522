"""What rounding and quantising cost: teacher-forced figures on a text that everybody has.

    python -m tests.bench.quality [--windows 8] [--tokens 256] [--transformers]

The text is `pydoc_data.topics` of the standard library (the language reference as `help()` shows it), cut into windows. Each variant
reads the same tokens; what it would have said next is compared with float32 on plain torch. `--transformers` adds transformers' own
bfloat16, which takes minutes on a processor without bfloat16 instructions.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.cli.demo_model import ensure_demo_model
from tests.bench import report
from tests.engine.models.paged import Sequences, load

VARIANTS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "int4": {"dtype": "bfloat16", "quantize": "int4"},
    "int8_kv_cache": {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
    "int8_and_kv_cache": {"dtype": "bfloat16", "quantize": "int8", "kv_cache_dtype": "int8"},
}
Logits = Callable[[list[int]], Tensor]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--windows", type=report.at_least(1), default=8)
    parser.add_argument("--tokens", type=report.at_least(2), default=256, help="a window; the first one only starts it")
    parser.add_argument("--transformers", action="store_true")
    return parser.parse_args()


def windows_of(model_dir: Path, count: int, num_tokens: int) -> list[list[int]]:
    """The first tokens of the text, in windows of `num_tokens`."""
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = AutoTokenizer.from_pretrained(model_dir)(text[: count * num_tokens * 16]).input_ids
    if len(ids) < count * num_tokens:
        raise SystemExit(f"error: the text has {len(ids)} tokens; ask for fewer windows or tokens")
    return [ids[i * num_tokens : (i + 1) * num_tokens] for i in range(count)]


def ours(model_dir: Path, cpu_isa: str, settings: dict[str, str]) -> Logits:
    loaded = load(model_dir, cpu_isa=cpu_isa, **settings)
    kept = torch.int8 if settings.get("kv_cache_dtype") == "int8" else None
    return lambda ids: Sequences(loaded, 1, len(ids), block_size=16, cache_dtype=kept).step({0: ids})


def theirs(model_dir: Path) -> Logits:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()

    def logits(ids: list[int]) -> Tensor:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0].float()

    return logits


def figures(exact: list[Tensor], found: list[Tensor], windows: list[list[int]]) -> dict[str, float]:
    """Perplexity of the text; against `exact`: mean KL, share of equal best tokens, rms of the logits' error."""
    loss = kl = same = square = 0.0
    count = entries = 0
    for wanted, actual, ids in zip(exact, found, windows, strict=True):
        told, said = wanted[:-1].log_softmax(-1), actual[:-1].log_softmax(-1)
        rows = len(ids) - 1
        loss -= float(said[torch.arange(rows), torch.tensor(ids[1:])].double().sum())
        kl += float((told.exp() * (told - said)).double().sum())
        same += float((told.argmax(-1) == said.argmax(-1)).sum())
        square += float((wanted[:-1] - actual[:-1]).square().double().sum())
        count += rows
        entries += told.numel()
    return {
        "perplexity": round(math.exp(loss / count), 3),
        "kl": round(kl / count, 5),
        "same_best_token": round(same / count, 4),
        "rms_logit_error": round(math.sqrt(square / entries), 4),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    began = report.environment()
    model_dir = Path(arguments.model) if arguments.model else ensure_demo_model()
    windows = windows_of(model_dir, arguments.windows, arguments.tokens)
    exact = [*map(ours(model_dir, "torch", VARIANTS["float32"]), windows)]
    results = {}
    systems = {name: ours(model_dir, "auto", settings) for name, settings in VARIANTS.items()}
    if arguments.transformers:
        systems["transformers_bfloat16"] = theirs(model_dir)
    for name, logits in systems.items():
        results[name] = figures(exact, [*map(logits, windows)], windows)
    return report.emit("quality", vars(arguments) | {"model": model_dir.name, "text": "pydoc_data.topics"}, results, began)


if __name__ == "__main__":
    report.print_report(measure(parse()))
