"""`sluice bench` as a process against a served stand-in: gRPC, Kafka, an interruption, a sweep."""

import asyncio
import json
import re
import signal
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.integration.app_harness import WAIT_S, Sluice, command, run, serve, values
from tests.integration.kafka_harness import Broker

SMALL = ("--requests", "12", "--concurrency", "4", "--prompt-tokens", "6", "--output-tokens", "8", "--json")


async def ended(sluice: Sluice, count: int, code: str = "ok") -> None:
    """Waits until the service has ended so many requests with `code`."""
    counted = re.compile(rf'^sluice_requests_total\{{.*code="{code}".*\}} (\S+)$', re.MULTILINE)

    def so_far() -> float:
        with urlopen(f"http://{sluice.facts['admin']}/metrics", timeout=5) as response:
            return sum(map(float, counted.findall(response.read().decode())))

    async with asyncio.timeout(WAIT_S):
        while await asyncio.to_thread(so_far) < count:  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.02)


async def test_a_replica_over_grpc(tiny_model_dir: Path) -> None:
    async with serve(values(tiny_model_dir)) as sluice:
        code, out, errors = await run("bench", "--target", sluice.facts["grpc"], "--deadline", "60", *SMALL)
    report = json.loads(out)
    (found,) = report["runs"]
    assert (code, errors, report["interrupted"]) == (0, "", False)
    assert (found["num_finished"], found["output_tokens"], found["errors"]) == (12, 96, {})
    assert found["e_tps"] == found["output_tokens_per_s"] > 0
    assert found["ttft_ms"]["count"] == found["added_ttft_ms"]["count"] == 12
    assert report["parameters"]["workload"]["lengths"] == {"shape": "fixed", "prompt_tokens": 6, "output_tokens": 8}
    assert report["endpoint"]["models"] == [tiny_model_dir.name]


@pytest.mark.kafka
async def test_kafka_from_prompts_to_chunks_and_results(tiny_model_dir: Path, topics_of_its_own: Broker) -> None:
    broker = topics_of_its_own
    where = ("--brokers", broker.bootstrap, "--set", f"kafka.topic_prefix={broker.prefix}")
    async with serve(values(tiny_model_dir, broker=broker)):
        code, out, errors = await run("bench", *where, *SMALL)
    report = json.loads(out)
    (found,) = report["runs"]
    assert (code, errors, report["endpoint"]["embedded_broker"]) == (0, "", False)
    assert (found["num_finished"], found["output_tokens"], found["errors"]) == (12, 96, {})
    assert found["ttft_ms"]["count"] == 12


@pytest.mark.kafka
async def test_a_prompt_that_took_too_long_is_cancelled_where_it_runs(tiny_model_dir: Path, topics_of_its_own: Broker) -> None:
    broker = topics_of_its_own
    where = ("--brokers", broker.bootstrap, "--set", f"kafka.topic_prefix={broker.prefix}")
    limits = ("--timeout", "1.5", "--requests", "2", "--warm-up", "0", "--output-tokens", "5000", "--json")
    async with serve(values(tiny_model_dir, broker=broker, engine={"stand_in_tokens_per_s": 20.0})) as sluice:
        code, out, _ = await run("bench", *where, *limits)
        await ended(sluice, 2, code="cancelled")
    assert (code, json.loads(out)["runs"][0]["errors"]) == (1, {"timeout": 2})


async def test_kafka_on_an_embedded_broker_which_answers_late(tiny_model_dir: Path) -> None:
    embedded = {"enabled": True, "embedded": True, "bootstrap_servers": "127.0.0.1:0"}
    async with serve(values(tiny_model_dir, kafka=embedded)) as sluice:
        code, out, errors = await run("bench", "--brokers", sluice.facts["kafka"], *SMALL)
    report = json.loads(out)
    (found,) = report["runs"]
    assert (code, errors, report["endpoint"]["embedded_broker"]) == (0, "", True)
    assert (found["num_finished"], found["output_tokens"], found["errors"]) == (12, 96, {})


async def test_a_sweep_runs_at_shares_of_what_the_closed_loop_reached(tiny_model_dir: Path) -> None:
    async with serve(values(tiny_model_dir, engine={"stand_in_tokens_per_s": 200.0})) as sluice:
        code, out, _ = await run("bench", "--target", sluice.facts["grpc"], "--load", "0.2..0.4", *SMALL)
    closed, *levels = json.loads(out)["runs"]
    assert (code, [level["load"] for level in levels]) == (0, [0.2, 0.3, 0.4])
    assert [level["rate"] for level in levels] == pytest.approx(
        [share * closed["steady_requests_per_s"] for share in (0.2, 0.3, 0.4)], rel=1e-2
    )
    assert {level["num_finished"] for level in levels} == {12}


async def test_ctrl_c_prints_what_was_measured_and_ends_with_130(tiny_model_dir: Path) -> None:
    async with serve(values(tiny_model_dir, engine={"stand_in_tokens_per_s": 100.0})) as sluice:
        arguments = ("--concurrency", "2", "--requests", "100000", "--output-tokens", "4", "--prompt-tokens", "4", "--json")
        async with command("bench", "--target", sluice.facts["grpc"], *arguments) as bench:
            await ended(sluice, 6)
            bench.send(signal.SIGINT)
            code, out = await bench.finish()
    report = json.loads(out)
    assert (code, report["interrupted"], bench.errors.strip()) == (130, True, "")
    (found,) = report["runs"]
    assert (found["num_finished"] > 0, found["concurrency"], found["name"]) == (True, 2, "2 in flight (interrupted)")


async def test_requests_that_are_refused_are_counted_and_none_that_ends_well_is_a_failure(tiny_model_dir: Path) -> None:
    async with serve(values(tiny_model_dir)) as sluice:
        where = ("--target", sluice.facts["grpc"], "--prompt-tokens", "4", "--output-tokens", "100000", "--requests", "3")
        code, out, errors = await run("bench", *where, "--warm-up", "0")
        assert (code, errors) == (1, "error: no request ended well\n")
        assert "3 x too_many_tokens" in out
        code, _, errors = await run("bench", *where)
    assert code == 1
    assert errors.startswith("error: the warm-up failed: too_many_tokens: ")
