"""KV slots held without a live token, under a ShareGPT-like mix of lengths.

    python -m tests.bench.waste [--requests 400] [--block-size 16]

The real scheduler and block pool run a closed loop of requests with log-normal lengths whose means are those published for
ShareGPT (about 160 prompt and 340 output tokens; Kwon et al. 2023, figure 11); the tokens come from a tiny random model.
The figure is wasted slots / slots of used blocks, weighted by steps.
"""

import argparse
import random
import tempfile
from typing import Any

from engine import Engine, EngineConfig, Request, SamplingParams
from tests.bench import report
from tests.bench.tiny import write_tiny_model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=report.at_least(1), default=200)
    parser.add_argument("--concurrent", type=report.at_least(1), default=64)
    parser.add_argument("--block-size", type=report.at_least(1), default=16)
    parser.add_argument("--num-blocks", type=report.at_least(1), default=2048)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    began = report.environment()
    draw = random.Random(arguments.seed)

    def length(mean: float, sigma: float) -> int:
        # A log-normal's mean is exp(mu + sigma^2 / 2).
        return max(4, min(2000, round(draw.lognormvariate(0, sigma) * mean / pow(2.718281828, sigma * sigma / 2))))

    with tempfile.TemporaryDirectory() as directory:
        write_tiny_model(directory)
        engine = Engine(
            EngineConfig(
                model_dir=directory,
                load_format="dummy",
                block_size=arguments.block_size,
                num_blocks=arguments.num_blocks,
                max_num_seqs=arguments.concurrent,
                max_num_batched_tokens=2048,
            )
        )
        waiting = [(length(161, 1.0), length(338, 0.8)) for _ in range(arguments.requests)]
        total_tokens = sum(prompt + output for prompt, output in waiting)
        held = wasted = steps = running = preemptions = 0
        next_id = ended = 0
        while ended < arguments.requests:
            while waiting and running < arguments.concurrent:
                prompt, output = waiting.pop()
                engine.add(
                    Request(
                        request_id=str(next_id),
                        prompt_token_ids=tuple(draw.randrange(10, 500) for _ in range(prompt)),
                        sampling=SamplingParams(max_tokens=output, seed=next_id, temperature=0.0, ignore_eos=True),
                    )
                )
                next_id += 1
                running += 1
            step = engine.step()
            done = sum(output.finish_reason is not None for output in step.every())
            running, ended = running - done, ended + done
            steps += 1
            held += step.stats.num_used_blocks * arguments.block_size
            wasted += step.stats.num_wasted_slots
            preemptions += step.stats.num_preemptions
        engine.close()
    results = {
        "wasted_share": round(wasted / held, 4),
        "steps": steps,
        "tokens": total_tokens,
        "mean_held_slots": round(held / steps),
        "preemptions": preemptions,
    }
    return report.emit("waste", vars(arguments), results, began)


if __name__ == "__main__":
    report.print_report(measure(parse()))
