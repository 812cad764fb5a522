"""One load on a served process, as `sluice bench` puts it, with the CPU time that it cost each process."""

import asyncio
import random
import time
from dataclasses import dataclass

import psutil
import uvloop

from service.bench.drive import Limits
from service.bench.grpc_target import GrpcTarget
from service.bench.kafka_target import KafkaTarget
from service.bench.lengths import Lengths
from service.bench.run import Bench, Plan, Run
from service.bench.target import Target
from service.bench.workload import Workload
from service.config import KafkaSection
from service.kafka.connection import Connection
from tests.bench.served import Served

TRANSPORTS = ("grpc", "kafka")


def fixed(prompt_tokens: int, output_tokens: int) -> Workload:
    """Equal requests."""
    return Workload(lengths=Lengths(shape="fixed", prompt_tokens=prompt_tokens, output_tokens=output_tokens))


def plan(workload: Workload, *, requests: int = 0, duration_s: float = 0.0, **options: object) -> Plan:
    """A plan with limits."""
    return Plan(workload=workload, limits=Limits(max_requests=requests, duration_s=duration_s), **options)  # type: ignore[arg-type]


def target_of(served: Served, transport: str) -> Target:
    """The way into a served process."""
    if transport == "grpc":
        return GrpcTarget(served.grpc)
    return KafkaTarget(Connection(KafkaSection(), served.kafka))


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU time while a load ran, warm-up included, in microseconds an output token."""

    service_us: float
    engine_us: float
    load_us: float
    broker_us: float
    """0 where no broker was named."""

    def beside_engine(self) -> dict[str, float]:
        """By whom it was spent."""
        return {"service": self.service_us, "load generator": self.load_us, "broker": self.broker_us}


def run_load(served: Served, transport: str, wanted: Plan, seed: str, broker_pid: int | None = None) -> tuple[list[Run], Cost]:
    """The plan's runs. Requests of another `seed` are others, so that no block meets the last one's prefix cache."""
    work = Bench(
        wanted,
        target_of(served, transport),
        new_draw=lambda stream: random.Random(f"{seed} {stream}").random,
        clock=time.perf_counter,
    )

    async def go(target: Target) -> None:
        await target.open()
        try:
            await work.execute()
        finally:
            await target.close()

    processes = [served.process, served.child, psutil.Process()]
    if broker_pid is not None:
        processes.append(psutil.Process(broker_pid))
    before = [_cpu_s(process) for process in processes]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(go(work.target))
    after = [_cpu_s(process) for process in processes]
    failed = {code: count for run in work.runs for code, count in run.summary.errors.items()}
    if failed:
        raise RuntimeError(f"requests failed: {failed}")
    warm_up = wanted.warm_up * wanted.workload.lengths.output_tokens
    tokens = warm_up + sum(run.summary.output_tokens for run in work.runs)
    spent = [(end - start) / tokens * 1e6 for start, end in zip(before, after, strict=True)]
    return work.runs, Cost(*spent) if broker_pid is not None else Cost(*spent, 0.0)


def _cpu_s(process: psutil.Process) -> float:
    return sum(process.cpu_times()[:2])
