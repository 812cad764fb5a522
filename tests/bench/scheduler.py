"""Prints, as JSON, what the scheduler costs on the launch path: `python -m tests.bench.scheduler`.

`step_us`: median microseconds of `schedule` + `update` at so many decodes, contexts of about 1,000 tokens, blocks of 16.
`hash_us`: median microseconds to name all blocks of a prompt of 2,048 tokens.
"""

import statistics
from time import perf_counter_ns

from engine.request import Request, SamplingParams
from engine.scheduling.prefix_cache import extend_hashes, root_hash
from engine.scheduling.scheduler import Scheduler, SchedulerConfig
from engine.scheduling.step import ChunkResult, StepResult
from tests.bench import report

NUM_PROMPT_TOKENS = 1000
NUM_STEPS = 200


def make_decoding(num_seqs: int) -> Scheduler:
    """A scheduler whose sequences have all computed their prompts."""
    config = SchedulerConfig(
        num_blocks=num_seqs * 128,
        block_size=16,
        max_num_seqs=num_seqs,
        max_num_waiting=num_seqs,
        max_num_batched_tokens=8192,
        max_model_len=2048,
    )
    scheduler = Scheduler(config)
    for i in range(num_seqs):
        prompt = tuple((i * 31 + j) % 49_152 for j in range(NUM_PROMPT_TOKENS))
        sampling = SamplingParams(max_tokens=1000, seed=i)
        scheduler.add(Request(request_id=f"r{i}", prompt_token_ids=prompt, sampling=sampling), 0)
    while scheduler.stats().num_wasted_slots > 16 * num_seqs or scheduler.stats().num_waiting:
        step(scheduler)
    for _ in range(5):
        step(scheduler)
    return scheduler


def step(scheduler: Scheduler) -> tuple[int, int]:
    """One step of one token a sampling chunk; nanoseconds of `schedule` and of `update`."""
    began = perf_counter_ns()
    plan = scheduler.schedule(1)
    planned = perf_counter_ns()
    result = StepResult(chunks=tuple(ChunkResult(token_ids=(7,) if chunk.samples else ()) for chunk in plan.chunks))
    ran = perf_counter_ns()
    scheduler.update(plan, result, 2)
    return planned - began, perf_counter_ns() - ran


def measure_steps(num_seqs: int) -> dict[str, float]:
    """Medians over `NUM_STEPS` steps, in microseconds."""
    scheduler = make_decoding(num_seqs)
    times = [step(scheduler) for _ in range(NUM_STEPS)]
    schedule_us = statistics.median(taken for taken, _ in times) / 1e3
    update_us = statistics.median(taken for _, taken in times) / 1e3
    return {
        "schedule_us": round(schedule_us, 1),
        "update_us": round(update_us, 1),
        "step_us": round(schedule_us + update_us, 1),
    }


def measure_hash(num_tokens: int) -> float:
    """Median microseconds to name the blocks of a prompt."""
    token_ids, root, times = [i % 49_152 for i in range(num_tokens)], root_hash(""), []
    for _ in range(NUM_STEPS):
        began = perf_counter_ns()
        extend_hashes([], root, token_ids, 16)
        times.append(perf_counter_ns() - began)
    return round(statistics.median(times) / 1e3, 1)


def main() -> None:
    """Measures and prints."""
    began = report.environment()
    decodes = {str(num_seqs): measure_steps(num_seqs) for num_seqs in (8, 64, 256)}
    parameters = {"num_prompt_tokens": NUM_PROMPT_TOKENS, "steps": NUM_STEPS}
    results = {"decodes": decodes, "hash_2048_tokens_us": measure_hash(2048)}
    report.print_report(report.emit("scheduler", parameters, results, began))


if __name__ == "__main__":
    main()
