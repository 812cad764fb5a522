"""Where a decode step's time goes, by phase, the engine in this process and behind its child's socket.

    python -m tests.bench.step [--batches 1,8,32] [--steps 40] [--blocks 3] [--threads 0]

All rows decode greedily from prompts of 32 tokens; no step of a window lets a request in or ends one. Steps run in turns with the host
(engine.overlap off), so that phases add up. `compute` is the model and the
choice of tokens, from the call to its result; host share is what is left of the step. `layers_in_python` are the same steps with the
model's own loop instead of the recorded program: what recording saves is their difference. The child's `between_steps` is what it does
from the end of one step to the start of the next: read, encode, send. The parent's figures are of this process alone, a step.
"""

import argparse
import gc
import itertools
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import uvloop

from engine import Engine, EngineConfig, Request, SamplingParams
from engine.frames import FrameDecoder, encode
from engine.openmp import prefer_short_spin
from engine.output import StepOutput
from service.cli.demo_model import ensure_demo_model
from service.config import EngineSection, LoggingSection
from service.engine_process import EngineProcess
from service.telemetry import logging
from service.tokenization import Tokenization
from tests.bench import report

PROMPT_TOKENS = 32
SETTLE_STEPS = 6
COMPUTE = ("compute", "choose")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=report.counts, default="1,8,32")
    parser.add_argument("--steps", type=report.at_least(1), default=40)
    parser.add_argument("--blocks", type=report.at_least(1), default=3)
    parser.add_argument("--threads", type=report.at_least(0), default=0)
    return parser.parse_args()


def requests(names: str, batch: int, num_prompt: int, max_tokens: int) -> Iterator[Request]:
    """`batch` greedy requests with random prompts that end at `max_tokens` and nowhere else."""
    draw = random.Random(names)
    for i in range(batch):
        prompt = tuple(draw.randrange(1000, 40_000) for _ in range(num_prompt))
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True)
        yield Request(request_id=f"{names}-{i}", prompt_token_ids=prompt, sampling=sampling)


class Phases:
    """Seconds by phase: wraps the engine's own calls, each of which runs once a step."""

    def __init__(self, engine: Engine) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        loop = engine._loop
        self._runner: Any = loop._executor
        sampler = self._runner._sampler
        self._programs = self._runner._recorded_steps
        for owner, method, phase in (
            (loop._scheduler, "schedule", "schedule"),
            (self._programs or self._runner, "batch" if self._programs else "_batch", "inputs"),
            (self._programs or self._runner, "run" if self._programs else "_every", "compute"),
            (sampler, "launch", "choose"),
            (sampler, "take", "choose"),
            (self._runner, "collect", "collect"),
            (loop._scheduler, "update", "update"),
            (loop, "_stats", "stats"),
        ):
            setattr(owner, method, self._timed(phase, getattr(owner, method)))

    def _timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments, **named)
            self.seconds[phase] += time.perf_counter() - start
            return result

        return timed

    @contextmanager
    def layers_in_python(self) -> Iterator[None]:
        """The model's own loop over its layers, as where nothing can be recorded."""
        self._runner._recorded_steps = None
        yield
        self._runner._recorded_steps = self._programs


def window(engine: Engine, names: str, batch: int, steps: int, phases: Phases) -> tuple[list[float], list[StepOutput]]:
    """Seconds of each of `steps` steps that do nothing but decode `batch` rows, and what they said; `phases` holds theirs alone."""
    for request in requests(names, batch, PROMPT_TOKENS, steps + 2 * SETTLE_STEPS + batch):
        engine.add(request)
    while engine.step().stats.num_decode_tokens < batch:
        pass
    for _ in range(SETTLE_STEPS):
        engine.step()
    took, said = [], []
    phases.seconds.clear()
    for _ in range(steps):
        start = time.perf_counter()
        said.append(engine.step())
        took.append(time.perf_counter() - start)
    by_phase = dict(phases.seconds)
    while engine.has_work:
        engine.step()
    phases.seconds = defaultdict(float, by_phase)
    return took, said


def in_process(engine: Engine, phases: Phases, pieces: Tokenization, batch: int, steps: int, blocks: int) -> dict[str, Any]:
    took: list[float] = []
    plain: list[float] = []
    by_phase: dict[str, list[float]] = defaultdict(list)
    said: list[StepOutput] = []
    for block in range(blocks):
        with phases.layers_in_python():
            plain += window(engine, f"{batch}-{block}-python", batch, steps, phases)[0]
        seconds, said = window(engine, f"{batch}-{block}", batch, steps, phases)
        took += seconds
        for phase, spent in phases.seconds.items():
            by_phase[phase].append(spent / steps * 1e6)
    step_us = statistics.fmean(took) * 1e6
    phase_us = {phase: statistics.fmean(values) for phase, values in by_phase.items()}
    host_us = step_us - sum(phase_us[phase] for phase in COMPUTE)
    return {
        "step_ms": _spread_ms(took),
        "layers_in_python_step_ms": _spread_ms(plain),
        "phases_us": {phase: round(value, 1) for phase, value in phase_us.items()},
        "host_us": round(host_us, 1),
        "host_percent": 100 * host_us / step_us,
        "beside_the_step_us": _beside(said, pieces),
    }


def _beside(said: list[StepOutput], pieces: Tokenization) -> dict[str, float]:
    """Microseconds a step of what happens to its output: a frame made, read, its tokens made text."""
    detokenizers: dict[str, Any] = defaultdict(pieces.detokenizer)
    start = time.perf_counter()
    frames = [encode(step) for step in said]
    encoded = time.perf_counter()
    decoder = FrameDecoder()
    for frame in frames:
        list(decoder.feed(frame))
    decoded = time.perf_counter()
    for step in said:
        for output in step.every():
            for token_id in output.token_ids:
                detokenizers[output.request_id].push(token_id)
    ended = time.perf_counter()
    spans = {"encode": encoded - start, "decode": decoded - encoded, "detokenise": ended - decoded}
    return {name: round(span / len(said) * 1e6, 1) for name, span in spans.items()}


async def behind_the_socket(config: EngineConfig, batches: list[int], steps: int) -> dict[str, Any]:
    """The same windows of a child engine, by its own stamps."""
    engine = EngineProcess(config, EngineSection())
    await engine.start()
    outputs = engine.outputs()
    found = {}
    for batch in batches:
        for request in requests(f"child-{batch}", batch, PROMPT_TOKENS, steps + SETTLE_STEPS + batch):
            await engine.submit(request)
        stamps: list[tuple[int, int]] = []
        ended, cpu_s = 0, 0.0
        while ended < batch:
            step = await anext(outputs)
            ended += sum(output.finish_reason is not None for output in step.every())
            if step.stats.num_decode_tokens == batch and not step.stats.num_prefill_tokens and not ended:
                cpu_s = cpu_s or time.process_time()
                stamps.append((step.stats.started_ns, step.stats.ended_ns))
        parent_us = (time.process_time() - cpu_s) / len(stamps) * 1e6
        between = [(later[0] - earlier[1]) / 1e3 for earlier, later in itertools.pairwise(stamps)]
        period = [(later[0] - earlier[0]) / 1e6 for earlier, later in itertools.pairwise(stamps)]
        found[f"batch_{batch}"] = {
            "period_ms": report.quantiles(period, 3),
            "between_steps_us": report.quantiles(between, 1),
            "between_steps_percent": round(statistics.median(between) / statistics.median(period) / 10, 2),
            "parent_cpu_us": round(parent_us, 1),
        }
    await engine.close()
    return found


def _spread_ms(seconds: list[float]) -> dict[str, float]:
    return report.quantiles([value * 1e3 for value in seconds], 3)


def main() -> None:
    prefer_short_spin()
    # Standard output is the report's.
    logging.configure(LoggingSection(level="warning"))
    arguments, began = parse(), report.environment()
    model = ensure_demo_model()
    batches = [int(size) for size in arguments.batches.split(",")]
    config = EngineConfig(model_dir=str(model), enable_prefix_cache=False, num_threads=arguments.threads, overlap="off")
    engine = Engine(config)
    gc.collect()
    gc.freeze()  # as the child does
    phases, pieces = Phases(engine), Tokenization(model)
    results: dict[str, Any] = {
        f"batch_{batch}": in_process(engine, phases, pieces, batch, arguments.steps, arguments.blocks) for batch in batches
    }
    facts = asdict(engine.facts)
    engine.close()
    results["child"] = uvloop.run(behind_the_socket(config, batches, arguments.steps))
    kept = {name: facts[name] for name in ("operators", "num_threads", "dtype", "attention_backend")}
    report.print_report(report.emit("step", vars(arguments) | kept, results, began))


if __name__ == "__main__":
    main()
