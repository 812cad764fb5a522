"""`sluice bench`: load against an endpoint, and how well it did."""

import asyncio
import contextlib
import math
import os
import random
import time
from typing import Annotated, TypeVar

import typer
import uvloop

from service.bench.drive import Limits
from service.bench.grpc_target import GrpcTarget
from service.bench.kafka_target import KafkaTarget
from service.bench.lengths import SHAPES, Lengths
from service.bench.openai_target import ENDPOINTS, OpenAiTarget
from service.bench.run import Bench, Plan, SweepError
from service.bench.summary import Targets
from service.bench.target import TEMPERATURE, Target, TargetError
from service.bench.workload import Workload
from service.cli import bench_view
from service.cli.options import ConfigFile, Json, Overrides, settings_from
from service.cli.replicas import targets
from service.config import Settings
from service.errors import SetupError
from service.kafka.connection import Connection

Known = TypeVar("Known", bound=str)

_WHERE, _LOAD, _WORK, _GOALS = "Where", "How much", "What is asked", "What counts as good"
_SWEEP_S = 30.0
_DEFAULT_REQUESTS = 100


def bench(
    url: Annotated[
        str, typer.Option("--url", help="An OpenAI-compatible base URL, as http://host:8000/v1.", rich_help_panel=_WHERE)
    ] = "",
    target: Annotated[
        str, typer.Option("--target", "-t", help="A Sluice replica's gRPC host:port (the default).", rich_help_panel=_WHERE)
    ] = "",
    brokers: Annotated[
        str,
        typer.Option(
            "--brokers",
            "-b",
            help="Kafka, comma-separated host:port: prompts in, chunks and results out.",
            rich_help_panel=_WHERE,
        ),
    ] = "",
    model: Annotated[
        str, typer.Option("--model", help="The model's name; empty: the first that is served.", rich_help_panel=_WHERE)
    ] = "",
    endpoint: Annotated[
        str, typer.Option("--endpoint", help=f"With --url: {' or '.join(ENDPOINTS)}.", rich_help_panel=_WHERE)
    ] = ENDPOINTS[0],
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, max=4096, help="Closed loop: requests in flight.", rich_help_panel=_LOAD)
    ] = 16,
    rate: Annotated[
        float,
        typer.Option("--rate", min=0, help="Open loop: Poisson arrivals, requests a second.", rich_help_panel=_LOAD),
    ] = 0.0,
    load: Annotated[
        str,
        typer.Option(
            "--load",
            help="A closed loop, then open ones at these shares of its rate: 0.1..0.9 (steps of 0.1) or 0.1,0.5,0.9.",
            rich_help_panel=_LOAD,
        ),
    ] = "",
    requests: Annotated[
        int,
        typer.Option(
            "--requests", "-n", min=0, help="Requests of each run; default 100 without --duration.", rich_help_panel=_LOAD
        ),
    ] = 0,
    duration: Annotated[
        float,
        typer.Option(
            "--duration", min=0, help="Seconds in which each run sends; default 30 with --load.", rich_help_panel=_LOAD
        ),
    ] = 0.0,
    warm_up: Annotated[
        int,
        typer.Option(
            "--warm-up", min=-1, help="Requests before the first run; -1: one run's concurrency.", rich_help_panel=_LOAD
        ),
    ] = -1,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds after which a request counts as failed.", rich_help_panel=_LOAD)
    ] = 120.0,
    lengths: Annotated[
        str,
        typer.Option("--lengths", help=f"How lengths spread around their means: {', '.join(SHAPES)}.", rich_help_panel=_WORK),
    ] = "fixed",
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, max=1_000_000, help="Mean prompt length, in words.", rich_help_panel=_WORK)
    ] = 128,
    output_tokens: Annotated[
        int, typer.Option("--output-tokens", min=1, max=1_000_000, help="Mean tokens asked for.", rich_help_panel=_WORK)
    ] = 64,
    shared_prefix_tokens: Annotated[
        int,
        typer.Option(
            "--shared-prefix-tokens",
            min=0,
            max=1_000_000,
            help="Words that all prompts begin with, beside their own.",
            rich_help_panel=_WORK,
        ),
    ] = 0,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos/--no-ignore-eos",
            help="Ask for all the tokens, whatever the model says (not a field of OpenAI's own servers).",
            rich_help_panel=_WORK,
        ),
    ] = True,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            help="Same seed, same requests and arrivals; a prefix cache then knows them the second time. Default: drawn, and shown.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    deadline: Annotated[
        float, typer.Option("--deadline", min=0, help="Seconds for a whole request; 0: none.", rich_help_panel=_GOALS)
    ] = 0.0,
    ttft: Annotated[
        float, typer.Option("--ttft", min=0, help="Most milliseconds to the first token; 0: any.", rich_help_panel=_GOALS)
    ] = 0.0,
    tpot: Annotated[
        float, typer.Option("--tpot", min=0, help="Most milliseconds a token after it; 0: any.", rich_help_panel=_GOALS)
    ] = 0.0,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Put load on an endpoint and report throughput, latencies and errors.

    Closed loop by default; --rate opens it, --load sweeps from light to heavy. E-TPS: output tokens of requests that met --deadline, a
    second; without --deadline there is none. Goodput: requests that met --deadline, --ttft and --tpot, a second. In an open loop latency
    counts from the instant at which a request was due, so a stall shows in full. TTFT: to the first token. TPOT: a token after it, on a
    request's average. ITL: between two messages with tokens, as a reader sees them. p99/p50: of whole requests. Percentiles are of
    finished requests: where some failed, it says how many. Ctrl-C prints what was measured so far. Prompts are generated from --seed;
    OPENAI_API_KEY is sent to --url where it is set.
    """
    _finite(rate=rate, duration=duration, timeout=timeout, deadline=deadline, ttft=ttft, tpot=tpot)
    seed = random.SystemRandom().randrange(1_000_000) if seed is None else seed
    settings = settings_from(config, overrides, {"kafka": {"bootstrap_servers": brokers or None}})
    plan = Plan(
        workload=Workload(
            lengths=Lengths(
                shape=_one_of("--lengths", lengths, SHAPES), prompt_tokens=prompt_tokens, output_tokens=output_tokens
            ),
            shared_prefix_tokens=shared_prefix_tokens,
        ),
        limits=_limits(requests, duration, timeout, sweep=bool(load)),
        concurrency=concurrency,
        rate=rate,
        loads=_loads(load, rate),
        warm_up=concurrency if warm_up < 0 else warm_up,
        targets=Targets(deadline_s=deadline, ttft_s=ttft / 1e3, tpot_s=tpot / 1e3),
    )
    where = _target(settings, url, target, brokers, model=model, endpoint=endpoint, ignore_eos=ignore_eos)
    work = Bench(plan, where, new_draw=lambda stream: random.Random(f"{seed} {stream}").random, clock=time.perf_counter)
    asked = {"model": model, "temperature": TEMPERATURE, "ignore_eos": ignore_eos}
    began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    report = bench_view.Report(plan, work, seed=seed, asked=asked, began=began, as_json=as_json)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(where, work, report))
    except KeyboardInterrupt:
        report.show(interrupted=True)
        raise
    except TargetError as error:
        hint = "; begin with fewer requests: --warm-up" if error.code == "overloaded" and plan.warm_up > 1 else ""
        raise SetupError(f"the warm-up failed: {error.code}: {error}{hint}", exit_code=1) from error
    except SweepError as error:
        report.show()
        raise SetupError(f"--load: {error}; give it more with --requests or --duration", exit_code=1) from error
    report.show()
    if not any(run.summary.num_finished for run in work.runs):
        raise SetupError("no request ended well", exit_code=1)


async def _run(target: Target, work: Bench, report: bench_view.Report) -> None:
    try:
        report.endpoint = await target.open()
        watching = asyncio.create_task(report.watch())
        try:
            await work.execute()
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
    finally:
        await target.close()


def _target(settings: Settings, url: str, address: str, brokers: str, *, model: str, endpoint: str, ignore_eos: bool) -> Target:
    if sum(map(bool, (url, address, brokers))) > 1:
        raise SetupError("--url, --target and --brokers name different endpoints: give one of them")
    if url:
        return OpenAiTarget(
            url,
            endpoint=_one_of("--endpoint", endpoint, ENDPOINTS),
            model=model,
            api_key=os.environ.get("OPENAI_API_KEY", ""),
            ignore_eos=ignore_eos,
        )
    if brokers:
        return KafkaTarget(
            Connection(settings.kafka), topic_prefix=settings.kafka.topic_prefix, model=model, ignore_eos=ignore_eos
        )
    replica, *others = targets(settings, address)
    if others:
        raise SetupError(f"--target {address}: load is put on one replica; name one")
    return GrpcTarget(replica, model=model, ignore_eos=ignore_eos)


def _finite(**options: float) -> None:
    """Limits of options let infinity pass, and those of some versions of Typer what is no number."""
    for name, value in options.items():
        if not math.isfinite(value):
            raise SetupError(f"--{name} {value}: give a number")


def _limits(requests: int, duration_s: float, timeout_s: float, *, sweep: bool) -> Limits:
    if not requests and not duration_s:
        requests, duration_s = (0, _SWEEP_S) if sweep else (_DEFAULT_REQUESTS, 0.0)
    return Limits(max_requests=requests, duration_s=duration_s, timeout_s=timeout_s)


def _loads(text: str, rate: float) -> tuple[float, ...]:
    if not text:
        return ()
    if rate:
        raise SetupError("--load finds its own rates: leave --rate away")
    first, dots, last = text.partition("..")
    try:
        loads = tuple(float(part) for part in ((first, last) if dots else text.split(",")))
    except ValueError:
        loads = ()
    if not loads or not all(0 < load <= 2 for load in loads) or (dots and loads[0] > loads[1]):
        raise SetupError(f"--load {text}: write it as 0.1..0.9, or as shares between 0 and 2 with commas, as 0.1,0.5,0.9")
    if not dots:
        return loads
    # Steps of a tenth from the first on; a last that floating point puts a hair beyond counts.
    return tuple(round(loads[0] + step / 10, 6) for step in range(int((loads[1] - loads[0]) * 10 + 1e-6) + 1))


def _one_of(option: str, value: str, allowed: tuple[Known, ...]) -> Known:
    for known in allowed:
        if value == known:
            return known
    raise SetupError(f"{option} {value}: choose one of {', '.join(allowed)}")
