"""On a machine with a GPU: the whole service over a Llama-3-8B shape, against the engine offline in the same process, run and device.

    python -m tests.bench.gpu_service --out DIR [--tiny] [--parts tokens,grpc 64,kafka 64,first token,open loop,grpc 16,kafka 16]

prints one JSON object; exits 3 where there is no GPU, unless `--tiny` takes a small shape that a CPU computes too, and 1 when a part
failed. Weights are random, the tokenizer is made (`word_tokenizer.py`), the broker is the embedded one. Parts, each with its traceback
in place of figures when it fails: `offline` (loading, a first request with kernels to compile), `service` (from exec to ready),
`tokens` (greedy and drawn ones over gRPC, one request at a time, against the engine's), `grpc N` and `kafka N` (N in flight, against
the engine with as many, blocks interleaved), `first token` (of one request alone) and `open loop` (ShareGPT-like lengths: a closed
loop, then Poisson arrivals at a share of its rate). DIR gets report.json, which grows part by part, and the service's log. Whatever
hangs, all ends `--limit-s` after the start.
"""

import argparse
import asyncio
import gc
import itertools
import json
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine import Engine, Request, SamplingParams
from engine.openmp import prefer_short_spin
from service.bench.lengths import Lengths
from service.bench.summary import Targets
from service.bench.workload import Workload, words
from service.config import Settings, load
from service.contract import Delta, PromptRequest, SamplingFields
from service.rpc.client import SluiceClient
from service.tokenization import Tokenization
from tests.bench import report
from tests.bench.gpu_bench import LLAMA_3_8B
from tests.bench.load_run import fixed, plan, run_load
from tests.bench.parts import Document, Figures, ending_within
from tests.bench.served import Served, resident_bytes, serving
from tests.bench.service import compare, tokenized
from tests.bench.tiny import TINY
from tests.bench.word_tokenizer import write_word_tokenizer

PARTS = "tokens,grpc 64,kafka 64,first token,open loop,grpc 16,kafka 16"
TINY_PARTS = "tokens,grpc 8,kafka 8,first token,open loop,grpc 4,kafka 4"
FULL_SIZE = {
    "parts": PARTS,
    "prompt_tokens": 512,
    "new_tokens": 128,
    "alone": 100,
    "level_s": 8.0,
    "max_num_seqs": 128,
    "max_num_batched_tokens": 2048,
    "kv_mib": 12 << 10,
}
TINY_SIZE = FULL_SIZE | {
    "parts": TINY_PARTS,
    "prompt_tokens": 48,
    "new_tokens": 8,
    "alone": 20,
    "level_s": 2.0,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "kv_mib": 64,
}
WAIT_S = 60.0
"""For one request that is asked alone, the first of all included."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a small shape and few requests: a rehearsal")
    parser.add_argument("--parts")
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--alone", type=int, help="requests of `first token`")
    parser.add_argument("--level-s", type=float, help="of each of the two levels of `open loop`")
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--kv-mib", type=int, help="of each of the two engines")
    parser.add_argument("--load", type=float, default=0.7, help="share of the closed loop's rate")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="requests of a block for each that is in flight")
    parser.add_argument("--budget-s", type=float, default=130.0, help="no part begins later")
    parser.add_argument("--limit-s", type=float, default=180.0)
    parser.add_argument("--commit", default="", help="where the tree is a copy without its repository")
    parser.set_defaults(**(TINY_SIZE if "--tiny" in arguments else FULL_SIZE))
    return parser.parse_args(arguments)


def overrides(options: argparse.Namespace, model: Path) -> dict[str, dict[str, Any]]:
    """The settings of both engines, and of the service around one."""
    return {
        "model": {"path": str(model), "name": "random", "load_format": "dummy"},
        "engine": {
            "kv_cache_bytes": options.kv_mib << 20,
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": options.max_num_batched_tokens,
            "start_timeout_s": 60.0,
        },
        "admin": {"drain_grace_s": 5.0},
        "logging": {"level": "info", "format": "json"},
    }


def make_model(options: argparse.Namespace, directory: Path) -> Path:
    shape: Figures = TINY | {"vocab_size": LLAMA_3_8B["vocab_size"]} if options.tiny else LLAMA_3_8B
    (directory / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    write_word_tokenizer(directory, shape["vocab_size"])
    return directory


class Bench:
    """One engine in this process, one behind the service, of equal settings, weights and device."""

    def __init__(self, options: argparse.Namespace, model: Path) -> None:
        self.options = options
        self.model = model
        self.settings: Settings = load(overrides=overrides(options, model))
        self.tokenization = Tokenization(model)
        self._ids = itertools.count()
        self._engine: Engine | None = None
        self._served: Served | None = None

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("there is no engine offline")
        return self._engine

    @property
    def served(self) -> Served:
        if self._served is None:
            raise RuntimeError("there is no service")
        return self._served

    def load(self) -> Figures:
        began = time.perf_counter()
        engine = Engine(self.settings.engine_config(str(self.model)))
        loaded_s = time.perf_counter() - began
        self._engine = engine
        # What was imported and built lives as long as the process: a collection that walked it all would hold the clients up.
        gc.collect()
        gc.freeze()
        facts = engine.facts
        began = time.perf_counter()
        self.say(self.prompts("first", 1)[0], 4)
        return {
            "device": facts.device,
            "attention_backend": facts.attention_backend,
            "num_parameters": facts.num_parameters,
            "weight_bytes": facts.weight_bytes,
            "kv_slots": facts.num_blocks * facts.block_size,
            "load_s": round(loaded_s, 2),
            "first_request_s": round(time.perf_counter() - began, 2),
        }

    def serve(self, stack: ExitStack) -> Figures:
        flags = [
            part
            for section, fields in overrides(self.options, self.model).items()
            for name, value in fields.items()
            for part in ("--set", f"{section}.{name}={value}")
        ]
        log = self.options.out / "service.log"
        served = serving("--embedded", "--brokers", "127.0.0.1:0", *flags, log=log, start_timeout_s=WAIT_S)
        self._served = stack.enter_context(served)
        began = time.perf_counter()
        asyncio.run(self._said_over_grpc(self.prompts("first served", 1), 4))
        return {
            "ready_s": round(self.served.ready_s, 2),
            "load_s": self.served.load_s,
            "first_request_s": round(time.perf_counter() - began, 2),
            "parent_mib": round(resident_bytes(self.served.process) / 2**20),
            "engine_mib": round(resident_bytes(self.served.child) / 2**20),
        }

    def tokens(self) -> Figures:
        """Prompts of several lengths, one at a time: every step has the same shape in both engines, so it gives the same bits.

        Drawn tokens, too: they tell of differences that are too small to change the best one.
        """
        draw = random.Random("tokens").random
        num_new = min(self.options.new_tokens, 32)
        found: Figures = {}
        for name, temperature in (("greedy", 0.0), ("drawn", 1.0)):
            lengths = [max(1, self.options.prompt_tokens * share // 8) for share in range(1, 9)]
            prompts = [self.ids_of(" ".join(words(length, draw))) for length in lengths]
            expected = [self.say(prompt, num_new, temperature) for prompt in prompts]
            said = asyncio.run(self._said_over_grpc(prompts, num_new, temperature))
            found[name] = {
                "equal": said == expected,
                "prompts": len(prompts),
                "tokens": sum(map(len, said)),
                "distinct_tokens": len(set(itertools.chain(*said))),
                "tokens_before_the_first_difference": [_common(*both) for both in zip(said, expected, strict=True)],
            }
        return found

    def closed_loop(self, transport: str, concurrent: int) -> Figures:
        arguments = self._load(concurrent)
        return compare(
            self.engine,
            self.tokenization,
            self.served,
            arguments,
            transports=(transport,),
            seed=f"{transport} {concurrent} ",
        )

    def first_token(self) -> Figures:
        """Of one request alone: over gRPC, what of it the engine's own part is by its own word, and the engine's offline."""
        options = self.options
        alone = plan(fixed(options.prompt_tokens, 2), requests=options.alone, concurrency=1, warm_up=4)
        [run], _ = run_load(self.served, "grpc", alone, "alone")
        found = run.summary.as_json()
        offline_s = []
        for prompt in self.prompts("alone offline", options.alone):
            began = time.perf_counter()
            self._add(prompt, 2)
            while not any(output.token_ids for output in self.engine.step().every()):
                pass
            offline_s.append(time.perf_counter() - began)
            self._finish()
        return {
            "grpc_ms": found["ttft_ms"],
            "beyond_the_engine_ms": found["added_ttft_ms"],
            "offline_ms": report.quantiles([1e3 * one for one in offline_s]),
        }

    def open_loop(self) -> Figures:
        options = self.options
        lengths = Lengths(shape="sharegpt", prompt_tokens=options.prompt_tokens, output_tokens=options.new_tokens)
        wanted = plan(
            Workload(lengths=lengths),
            duration_s=options.level_s,
            concurrency=self._most(),
            loads=(options.load,),
            warm_up=self._most(),
            targets=Targets(deadline_s=10.0, ttft_s=0.5, tpot_s=0.05),
        )
        runs, cost = run_load(self.served, "grpc", wanted, "open loop")
        closed, opened = runs
        return {
            "closed": closed.summary.as_json(),
            "open": opened.summary.as_json() | {"rate": round(opened.rate, 2)},
            "cpu_us_a_token": cost.beside_engine(),
        }

    def parts(self) -> Iterator[tuple[str, Callable[[], Figures]]]:
        """Those that are asked for, in their order."""
        named = {"tokens": self.tokens, "first token": self.first_token, "open loop": self.open_loop}
        for name in self.options.parts.split(","):
            transport, _, concurrent = name.partition(" ")
            if name in named:
                yield name, named[name]
            else:
                yield name, partial(self.closed_loop, transport, int(concurrent))

    def say(self, prompt: tuple[int, ...], num_new: int, temperature: float = 0.0) -> list[int]:
        """What the engine says to one prompt alone."""
        self._add(prompt, num_new, temperature)
        return self._finish()

    def ids_of(self, text: str) -> tuple[int, ...]:
        return asyncio.run(self.tokenization.encode_text(text))

    def prompts(self, seed: str, count: int) -> list[tuple[int, ...]]:
        return tokenized(self.tokenization, self._load(1), seed, count)

    def _load(self, concurrent: int) -> argparse.Namespace:
        """The arguments of tests/bench/service.py."""
        options = self.options
        return argparse.Namespace(
            concurrent=concurrent,
            requests=options.rounds * concurrent,
            warm_up=concurrent,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            blocks=options.blocks,
        )

    def _most(self) -> int:
        """In flight in any closed loop."""
        return max((int(part) for part in self.options.parts.replace(",", " ").split() if part.isdigit()), default=16)

    def _add(self, prompt: tuple[int, ...], num_new: int, temperature: float = 0.0) -> None:
        sampling = SamplingParams(max_tokens=num_new, seed=0, temperature=temperature, ignore_eos=True)
        self.engine.add(Request(request_id=str(next(self._ids)), prompt_token_ids=prompt, sampling=sampling))

    def _finish(self) -> list[int]:
        said: list[int] = []
        while self.engine.has_work:
            for output in self.engine.step().every():
                said += output.token_ids
        return said

    async def _said_over_grpc(self, prompts: list[tuple[int, ...]], num_new: int, temperature: float = 0.0) -> list[list[int]]:
        sampling = SamplingFields(max_tokens=num_new, temperature=temperature, seed=0, ignore_eos=True)
        every: list[list[int]] = []
        async with SluiceClient(self.served.grpc) as client:
            for prompt in prompts:
                said: list[int] = []
                async with asyncio.timeout(WAIT_S), client.stream(PromptRequest(token_ids=prompt, sampling=sampling)) as events:
                    async for event in events:
                        if isinstance(event, Delta):
                            said += event.token_ids
                every.append(said)
        return every


def _common(mine: list[int], theirs: list[int]) -> int:
    """Tokens before the first that differs."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine, theirs, strict=False)))


def end(stack: ExitStack) -> Figures:
    """Ends the service, which drains. Raises when it does not end."""
    stack.close()
    return {}


def measure(options: argparse.Namespace, document: Document) -> None:
    with tempfile.TemporaryDirectory(prefix="sluice-") as directory, ExitStack() as stack:
        bench = Bench(options, make_model(options, Path(directory)))
        document.part("offline", bench.load)
        document.part("service", partial(bench.serve, stack))
        for name, measure_one in bench.parts():
            if document.elapsed_s > options.budget_s:
                document.results[name] = {"skipped": f"{document.elapsed_s:.0f} s had passed"}
                continue
            document.part(name, measure_one)
        document.part("end", partial(end, stack))


def main(arguments: list[str]) -> int:
    prefer_short_spin()
    options = parse(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print("gpu_service: no GPU here that torch can use; nothing was measured", file=sys.stderr)
        return 3
    options.out.mkdir(parents=True, exist_ok=True)
    parameters = {name: value for name, value in vars(options).items() if name not in ("out", "commit")}
    document = Document("gpu_service", options.out / "report.json", parameters, options.commit)
    with ending_within(options.limit_s, document):
        try:
            measure(options, document)
        except Exception:  # noqa: BLE001 - what was measured is worth having
            document.results["run"] = {"error": traceback.format_exc()}
        document.write()
    report.print_report(document.as_json())
    return int(document.failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
