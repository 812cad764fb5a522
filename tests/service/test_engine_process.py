"""The supervisor against real children: the stand-in engine under real frames, real deaths and real restarts."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import structlog

from engine import EngineConfig, Request, SamplingParams
from engine.output import TokenOutput
from service.config import EngineSection
from service.engine_child import Child, child_environment, spawner
from service.engine_process import EngineProcess, EngineStatus, backoff_s
from service.errors import SetupError

FAULT = "SLUICE_STAND_IN_FAULT"
CONFIG = EngineConfig(kind="stand-in")


def request(request_id: str, *, max_tokens: int = 40, n: int = 1, prompt: tuple[int, ...] = (1, 2, 3)) -> Request:
    return Request(request_id=request_id, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens, seed=7, n=n))


class Listener:
    """Reads every output; checks order as it goes."""

    def __init__(self, process: EngineProcess) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], TokenOutput] = {}
        self.changed = asyncio.Event()
        self.task = asyncio.create_task(self._read(process))

    async def _read(self, process: EngineProcess) -> None:
        async for step in process.outputs():
            for output in step.every():
                key = (output.request_id, output.choice)
                said = self.tokens.setdefault(key, [])
                assert key not in self.ends, "nothing may follow a finish reason"
                if output.token_ids:
                    assert output.seq == len(said)
                said += output.token_ids
                if output.finish_reason is not None:
                    self.ends[key] = output
            self.changed.set()

    async def until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def end_of(self, request_id: str, choice: int = 0) -> TokenOutput:
        await self.until(lambda: (request_id, choice) in self.ends)
        return self.ends[request_id, choice]


@asynccontextmanager
async def running(
    *,
    fault: str = "",
    pace: float = 0.0,
    statuses: list[EngineStatus] | None = None,
    config: EngineConfig = CONFIG,
    **section: float,
) -> AsyncIterator[tuple[EngineProcess, Listener]]:
    process = EngineProcess(
        replace(config, stand_in_tokens_per_s=pace),
        EngineSection(kind="stand-in", **section),
        on_status=None if statuses is None else statuses.append,
        spawn=spawner({FAULT: fault} if fault else None),
        backoff=lambda restarts: 0.0,
    )
    await process.start()
    listener = Listener(process)
    try:
        yield process, listener
    finally:
        await process.close()
        await listener.task


async def uninterrupted(requests: list[Request]) -> dict[tuple[str, int], list[int]]:
    async with running() as (process, listener):
        for item in requests:
            await process.submit(item)
        for item in requests:
            for choice in range(item.sampling.n):
                await listener.end_of(item.request_id, choice)
        return listener.tokens


async def test_requests_are_served_to_their_end() -> None:
    async with running() as (process, listener):
        await process.submit(request("a", max_tokens=5, n=2))
        ends = [await listener.end_of("a", choice) for choice in range(2)]
        assert [end.finish_reason for end in ends] == ["length", "length"]
        assert [len(listener.tokens["a", choice]) for choice in range(2)] == [5, 5]
        assert process.num_outstanding == 0


async def test_kill_in_the_middle_repeats_and_loses_no_token() -> None:
    requests = [request(f"r{number}", max_tokens=60, n=1 + number % 2, prompt=(number, 5)) for number in range(1, 7)]
    expected = await uninterrupted(requests)
    statuses: list[EngineStatus] = []
    async with running(pace=200.0, statuses=statuses) as (process, listener):
        for item in requests:
            await process.submit(item)
        first = process.status.pid
        await listener.until(lambda: len(listener.tokens) == len(expected) and min(map(len, listener.tokens.values())) >= 10)
        os.kill(first, signal.SIGKILL)
        for key in expected:
            await listener.end_of(*key)
        assert listener.tokens == expected
        assert process.facts().pid != first
    assert [status.state for status in statuses if status.progress is None] == ["ready", "restarting", "ready", "closed"]
    assert (statuses[-1].deaths, statuses[-1].restarts) == (1, 1)


async def test_more_choices_than_the_engine_takes_wait_outside_it() -> None:
    """It would refuse them, after the service has promised an answer."""
    config = replace(CONFIG, max_num_seqs=4, max_num_waiting=4)
    async with running(config=config) as (process, listener):
        for number, n in enumerate((1, 8, 3, 8, 16, 1, 5)):
            await process.submit(request(f"r{number}", max_tokens=5, n=n))
        await listener.until(lambda: len(listener.ends) == 42)
        assert {end.finish_reason for end in listener.ends.values()} == {"length"}


async def test_a_death_while_nobody_reads_loses_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit between the child and a reader that is away is said by the next child."""
    monkeypatch.setattr("service.engine_process._MAX_UNREAD_STEPS", 8)
    item = request("a", max_tokens=60)
    expected = await uninterrupted([item])
    process = EngineProcess(CONFIG, EngineSection(kind="stand-in"), spawn=spawner(), backoff=lambda restarts: 0.0)
    await process.start()
    await process.submit(item)
    await asyncio.sleep(0.3)
    os.kill(process.status.pid, signal.SIGKILL)
    await asyncio.sleep(0.8)
    listener = Listener(process)
    await listener.end_of("a")
    await process.close()
    await listener.task
    assert (listener.tokens, process.status.deaths) == (expected, 1)


async def test_two_kills_far_apart_do_not_blame_the_request() -> None:
    item = request("a", max_tokens=80)
    expected = await uninterrupted([item])
    async with running(pace=200.0) as (process, listener):
        await process.submit(item)
        for goal in (10, 30):
            await listener.until(lambda goal=goal: len(listener.tokens.get(("a", 0), ())) >= goal)  # type: ignore[misc]
            os.kill(process.status.pid, signal.SIGKILL)
        end = await listener.end_of("a")
        assert end.finish_reason == "length"
        assert listener.tokens == expected


@pytest.mark.parametrize("fault", ["exit@9", "raise@9", "garbage@9"])
async def test_every_kind_of_death_is_survived(fault: str) -> None:
    item = request("a", max_tokens=20)
    expected = await uninterrupted([item])
    async with running(fault=fault) as (process, listener):
        await process.submit(item)
        end = await listener.end_of("a")
        assert (end.finish_reason, end.error_message) == ("length", "")
        assert listener.tokens == expected
        assert process.status.deaths >= 1


async def test_a_hang_is_found_by_step_progress() -> None:
    item = request("a", max_tokens=20)
    expected = await uninterrupted([item])
    async with running(fault="hang@15", hang_timeout_s=0.5) as (process, listener):
        await process.submit(item)
        await listener.end_of("a")
        assert listener.tokens == expected
        assert "hang" in process.status.reason


async def test_an_idle_engine_is_never_taken_for_hung() -> None:
    async with running(hang_timeout_s=0.05) as (process, listener):
        await asyncio.wait({listener.task}, timeout=0.3)
        assert (process.status.state, process.status.deaths) == ("ready", 0)


async def test_a_poison_prompt_costs_two_deaths_and_no_neighbour() -> None:
    neighbours = [request(f"n{number}", max_tokens=30, prompt=(number, 4)) for number in range(1, 5)]
    expected = await uninterrupted(neighbours)
    async with running(fault="poison@666", pace=300.0) as (process, listener):
        for item in neighbours:
            await process.submit(item)
        await listener.until(lambda: len(listener.tokens) == len(neighbours))
        await process.submit(request("bad", prompt=(666,)))
        end = await listener.end_of("bad")
        assert (end.finish_reason, end.error_code) == ("error", "crash_loop")
        for key in expected:
            await listener.end_of(*key)
        assert {key: listener.tokens[key] for key in expected} == expected
        assert process.status.deaths == 2


async def test_an_abort_reaches_the_child() -> None:
    async with running(pace=50.0) as (process, listener):
        await process.submit(request("a", max_tokens=2000))
        await listener.until(lambda: ("a", 0) in listener.tokens)
        await process.abort("a")
        await process.abort("unknown")
        assert (await listener.end_of("a")).finish_reason == "cancelled"


async def test_an_abort_while_there_is_no_child_ends_at_once() -> None:
    async with running(pace=50.0) as (process, listener):
        await process.submit(request("a", max_tokens=2000))
        await listener.until(lambda: ("a", 0) in listener.tokens)
        os.kill(process.status.pid, signal.SIGKILL)
        await process.abort("a")
        assert (await listener.end_of("a")).finish_reason == "cancelled"


async def test_beyond_the_restart_limit_everything_ends_with_engine_failed() -> None:
    async with running(fault="exit@5", max_restarts=1) as (process, listener):
        await process.submit(request("a", max_tokens=100))
        assert (await listener.end_of("a")).error_code == "engine_failed"
        assert not process.status.alive
        await process.submit(request("b"))
        assert (await listener.end_of("b")).error_code == "engine_failed"


async def test_an_engine_that_cannot_load_says_why() -> None:
    process = EngineProcess(EngineConfig(kind="stand-in", model_dir="/nonexistent/model"), EngineSection())
    with pytest.raises(SetupError, match="nonexistent"):
        await process.start()


async def test_an_engine_that_cannot_start_names_the_setting_once(tmp_path: Path) -> None:
    process = EngineProcess(EngineConfig(model_dir=str(tmp_path), device="quantum"), EngineSection())
    with pytest.raises(SetupError, match=r"^the engine cannot start: engine\.device 'quantum' is no device"):
        await process.start()


async def test_a_child_that_is_never_ready_is_given_up() -> None:
    process = EngineProcess(EngineConfig(kind="stand-in"), EngineSection(start_timeout_s=0.01), backoff=lambda restarts: 0.0)
    with pytest.raises(SetupError, match=r"not ready within 0\.01 s"):
        await process.start()


async def test_closing_ends_what_is_outstanding_and_the_child() -> None:
    async with running(pace=20.0) as (process, listener):
        await process.submit(request("a", max_tokens=2000))
        await listener.until(lambda: ("a", 0) in listener.tokens)
        pid = process.status.pid
        await process.close()
        assert (await listener.end_of("a")).error_code == "engine_failed"
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_child_gets_no_credentials() -> None:
    environment = {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "0",
        "HF_TOKEN": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "SLUICE_KAFKA__X": "y",
    }
    assert set(child_environment(environment)) == {"PATH", "CUDA_VISIBLE_DEVICES", "PYTHONPATH", "PYTHONUNBUFFERED"}


def test_a_child_imports_from_where_the_service_does() -> None:
    alone, with_others = child_environment({})["PYTHONPATH"], child_environment({"PYTHONPATH": "/a:/b"})["PYTHONPATH"]
    assert with_others == f"{alone}:/a:/b"


def test_the_first_restart_is_immediate_and_later_ones_wait_longer() -> None:
    delays = [backoff_s(restarts) for restarts in range(1, 9)]
    assert delays[0] == 0.0
    assert delays == sorted(delays)
    assert delays[-1] == 5.0


async def test_a_child_whose_start_is_cancelled_does_not_stay(tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children()}
    starting = asyncio.create_task(spawner()(EngineConfig(kind="stand-in", model_dir=str(tmp_path))))
    # Nothing tells when a fork has happened.
    while not (begun := [child for child in psutil.Process().children() if child.pid not in before]):  # noqa: ASYNC110
        await asyncio.sleep(0)
    starting.cancel()
    await asyncio.wait({starting})
    assert psutil.wait_procs(begun, timeout=30)[1] == []


async def test_a_fault_of_the_supervisor_is_logged_by_type_and_place() -> None:
    async def spawn(_: EngineConfig) -> Child:
        raise ZeroDivisionError("what it says may quote a prompt")

    process = EngineProcess(CONFIG, EngineSection(kind="stand-in"), spawn=spawn)
    with structlog.testing.capture_logs() as lines, pytest.raises(SetupError):
        await process.start()
    (line,) = [line for line in lines if line["event"] == "engine supervisor failed"]
    assert (line["error"], line["where"][-1].split()[-1]) == ("ZeroDivisionError", "spawn")
    assert "quote a prompt" not in str(lines)
    assert not process.status.alive
