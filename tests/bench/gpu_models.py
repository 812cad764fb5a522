"""On a machine with a GPU: whole models and the whole engine there, against transformers and against the CPU.

`python -m tests.bench.gpu_models [--real MODEL_DIR]`, from the repository root, prints one JSON object; exits 0 when all is right,
1 when something is wrong, 3 where there is no GPU. Needs torch, triton, transformers, safetensors and msgspec only. Checked are: logits
of every model family in float32 against transformers' on the CPU (whole prompts, chunks and decodes mixed); bfloat16 against float32; a
step replayed from a CUDA graph against the model's own Python, bit for bit; greedy and sampled tokens of the whole engine in float32
against the CPU's, with and without steps launched ahead; and, with `--real`, the 40 prompts of tests/engine/data/parity.json against
the tokens that transformers says.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
import triton

from engine import Engine, EngineConfig, Request, SamplingParams
from engine.execution.captured_steps import CapturedSteps
from tests.engine.driving import Listener, run, step
from tests.engine.models.families import FAMILIES, save
from tests.engine.models.paged import Sequences, load
from tests.engine.tiny_model import VOCAB, write_tiny_model

Check = dict[str, Any]
LENGTH = 50
ATOL, RTOL = 2e-4, 1e-4
"""Those of tests/engine/models/test_llama.py: no looser on a GPU."""

PARITY = Path(__file__).parents[1] / "engine" / "data" / "parity.json"


def close(name: str, actual: torch.Tensor, expected: torch.Tensor) -> Check:
    """A NaN compares as false, so it fails."""
    share = ((actual - expected).abs() / (ATOL + RTOL * expected.abs())).max().item()
    return {"check": name, "of_tolerance": share, "ok": share <= 1}


def families(device: torch.device) -> Iterator[Check]:
    """Logits of every family as a whole prompt, in chunks beside others, and token by token."""
    for name, (family, overrides) in FAMILIES.items():
        with tempfile.TemporaryDirectory() as directory:
            theirs = save(Path(directory), family, overrides)
            loaded = load(Path(directory), on=device, dtype="float32")
            rough = load(Path(directory), on=device, dtype="bfloat16")
        ids = torch.randint(0, 61, (LENGTH,), generator=torch.Generator().manual_seed(5))
        with torch.inference_mode():
            expected = theirs(ids[None]).logits[0]
        tokens = ids.tolist()
        whole = Sequences(loaded, 1, LENGTH, on=device).step({0: tokens})
        yield close(f"{name}: a prompt", whole, expected)
        mixed = Sequences(loaded, 3, LENGTH, on=device)
        mixed.step({0: tokens[:7], 1: tokens[:1], 2: tokens[:33]})
        second = mixed.step({0: tokens[7:40], 1: tokens[1:2], 2: tokens[33:34]})
        yield close(f"{name}: mixed", second, torch.cat((expected[1:2], expected[33:34], expected[7:40])))
        single = Sequences(loaded, 1, LENGTH, on=device)
        rows = torch.cat([single.step({0: [token]}) for token in tokens])
        yield close(f"{name}: token by token", rows, expected)
        near = Sequences(rough, 1, LENGTH, on=device).step({0: tokens})
        error = ((near - expected).norm() / expected.norm()).item()
        # Weights of this size make bfloat16's rounding large; transformers' own bfloat16 is the measure.
        with torch.inference_mode():
            plain = theirs.bfloat16()(ids[None]).logits[0].float()
        allowed = 2 * ((plain - expected).norm() / expected.norm()).item()
        yield {"check": f"{name}: bfloat16", "error": error, "allowed": allowed, "ok": error <= allowed}


def requests(temperature: float = 0.0, **settings: Any) -> list[Request]:
    """Prompts of 1 to 90 tokens that end one after another, so that every number of sequences comes by."""
    return [
        Request(
            request_id=str(i),
            prompt_token_ids=tuple((7 * i + j * j) % VOCAB for j in range(1 + 8 * i)),
            sampling=SamplingParams(
                max_tokens=6 + 5 * i, seed=i, temperature=temperature, ignore_eos=True, logprobs=0, **settings
            ),
        )
        for i in range(12)
    ]


def said(config: EngineConfig, wanted: list[Request]) -> dict[Any, tuple[list[int], list[float]]]:
    """Tokens of every choice, and their log-probabilities."""
    engine = Engine(config)
    try:
        heard = run(engine, wanted).said
    finally:
        engine.close()
    return {key: (one.tokens, [logprob.logprob for logprob in one.logprobs]) for key, one in heard.items()}


def whole_engine(device: torch.device) -> Iterator[Check]:
    """A tiny model whose best tokens stand well apart."""
    with tempfile.TemporaryDirectory() as directory:
        path = str(write_tiny_model(Path(directory)))
        here = EngineConfig(model_dir=path, dtype="float32", device=str(device), num_blocks=256, enable_prefix_cache=False)
        there = replace(here, device="cpu", cpu_isa="torch")
        for name, settings in (
            ("greedy", {}),
            ("temperature", {"temperature": 0.9}),
            ("top-k, top-p", {"temperature": 1.1, "top_k": 20, "top_p": 0.9}),
            ("min-p, penalties", {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2, "frequency_penalty": 0.3}),
            ("bias", {"temperature": 0.7, "logit_bias": {5: 3.0, 9: -4.0}}),
        ):
            expected = said(there, requests(**settings))
            for overlap in ("on", "off"):
                actual = said(replace(here, overlap=overlap), requests(**settings))  # type: ignore[arg-type]
                wrong = [str(key) for key in expected if actual[key][0] != expected[key][0]]
                yield {"check": f"engine, {name}, overlap {overlap}: tokens are the CPU's", "wrong": wrong, "ok": not wrong}
        for dtype in ("float32", "bfloat16"):
            yield from graphs_equal_python(replace(here, dtype=dtype))
        yield arrivals_equal_the_cpu(here, there)


def graphs_equal_python(config: EngineConfig) -> Iterator[Check]:
    """Alone a step needs no padding, so each operator gets what it gets without a graph: bit for bit the same log-probabilities."""
    logits = CapturedSteps.logits
    for first in (3, 9):
        wanted = requests()[first : first + 1]
        replayed = said(config, wanted)
        CapturedSteps.logits = lambda self, batch: None  # type: ignore[method-assign]
        try:
            own = said(config, wanted)
        finally:
            CapturedSteps.logits = logits  # type: ignore[method-assign]
        yield {"check": f"engine, {config.dtype}: a graph says what Python says", "request": first, "ok": replayed == own}


def arrivals_equal_the_cpu(here: EngineConfig, there: EngineConfig) -> Check:
    """Prompts that come in beside decodes, three times over: a shape's second step is captured, its third a replay."""
    expected = {key[0]: tokens for key, (tokens, _) in said(there, requests()).items()}
    engine, listener = Engine(here), Listener()
    try:
        for turn in range(3):
            for request in requests():
                engine.add(replace(request, request_id=f"{turn}-{request.request_id}"))
                step(engine, listener)
            while engine.has_work:
                step(engine, listener)
        captured = engine._loop._executor._captured._mixed  # type: ignore[attr-defined, union-attr]
        graphs = sum(program is not None for program in captured.values())
    finally:
        engine.close()
    wrong = [key for (key, _), one in listener.said.items() if one.tokens != expected[key.partition("-")[2]]]
    return {
        "check": "engine, arrivals: tokens are the CPU's",
        "graphs": graphs,
        "wrong": wrong,
        "ok": graphs >= 4 and not wrong,
    }


def real(model_dir: str, device: torch.device) -> Iterator[Check]:
    """Greedy tokens of a real chat model in float32: batched, chunked and cached as the defaults do it."""
    content = json.loads(PARITY.read_text(encoding="utf-8"))
    sampling = SamplingParams(max_tokens=content["num_tokens"], seed=0, temperature=0.0)
    wanted = [
        Request(request_id=str(i), prompt_token_ids=tuple(case["prompt"]), sampling=sampling)
        for i, case in enumerate(content["cases"])
    ]
    for dtype in ("float32", "bfloat16"):
        engine = Engine(EngineConfig(model_dir=model_dir, dtype=dtype, device=str(device), num_blocks=4096))  # type: ignore[arg-type]
        heard = run(engine, wanted).said
        engine.close()
        same = sum(heard[str(i), 0].tokens == case["expected"] for i, case in enumerate(content["cases"]))
        # Only float32 has to agree to the last token: bfloat16's own transformers does not.
        yield {"check": f"{content['model']}, {dtype}", "same": same, "of": len(wanted), "ok": dtype != "float32" or same == 40}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_models", description="Models and engine on a GPU against transformers and the CPU."
    )
    parser.add_argument("--real", default="", help="directory of the demo's chat model")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_models: no GPU here that torch can use; nothing was checked", file=sys.stderr)
        return 3
    device = torch.device("cuda", 0)
    checks = [*families(device), *whole_engine(device)]
    if options.real:
        checks += real(options.real, device)
    wrong = [check for check in checks if not check["ok"]]
    report = {
        "device": torch.cuda.get_device_name(device),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__},
        "correct": not wrong,
        "checks": checks,
    }
    print(json.dumps(report, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
