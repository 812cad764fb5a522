"""The use case over a real engine child that is killed: clients see a pause, the same text, and exactly one end."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from opentelemetry.context import Context

from engine import EngineConfig
from service.admission import Admission
from service.config import AdmissionSection, EngineSection, TracingSection
from service.contract import Call, Delta, Failed, Finished, PromptRequest, SamplingFields
from service.engine_child import spawner
from service.engine_process import EngineProcess
from service.generation import Generation
from service.resolution import Limits
from service.streams import Streams
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import Tracing
from service.tokenization import Tokenization
from tests.service.tiny_tokenizer import write_model_dir


@asynccontextmanager
async def serving(model_dir: Path, *, pace: float = 0.0, fault: str = "") -> AsyncIterator[tuple[Generation, EngineProcess]]:
    engine = EngineProcess(
        EngineConfig(kind="stand-in", model_dir=str(model_dir), stand_in_tokens_per_s=pace),
        EngineSection(kind="stand-in"),
        spawn=spawner({"SLUICE_STAND_IN_FAULT": fault} if fault else None),
    )
    streams = Streams()
    generation = Generation(
        engine=engine,
        streams=streams,
        tokenization=Tokenization(model_dir),
        admission=Admission(AdmissionSection()),
        limits=Limits(model="tiny", max_tokens_cap=100, max_prompt_bytes=10_000),
        tracing=Tracing(TracingSection()),
        metrics=Metrics().requests,
    )
    dispatch = asyncio.create_task(streams.run(engine.outputs()))
    await engine.start()
    try:
        yield generation, engine
    finally:
        await generation.drain(0.0)
        await engine.close()
        await dispatch


async def generate(generation: Generation, number: int, *, kill: int = 0) -> tuple[str, Finished | Failed]:
    """The streamed text and the terminal event; kills process `kill` once a few tokens were seen."""
    prompt = PromptRequest(text=f"prompt {number}", sampling=SamplingFields(max_tokens=60, seed=number))
    stream = await generation.start(prompt, Call(request_id=f"r{number}", transport="grpc", parent=Context()))
    text, seen = "", 0
    async for event in stream:
        if isinstance(event, Delta):
            assert (event.seq, event.text_offset) == (seen, len(text))
            seen += len(event.token_ids)
            text += event.text
            if kill and seen >= 10:
                os.kill(kill, signal.SIGKILL)
                kill = 0
        elif isinstance(event, Finished | Failed):
            return text, event
    raise AssertionError("no terminal event")


async def test_a_killed_engine_changes_no_stream(tmp_path: Path) -> None:
    directory = write_model_dir(tmp_path)
    async with serving(directory) as (generation, _):
        expected = [await generate(generation, number) for number in range(6)]
    async with serving(directory, pace=200.0) as (generation, engine):
        pid = engine.status.pid
        async with asyncio.timeout(60):
            killed = await asyncio.gather(*(generate(generation, number, kill=pid * (number == 0)) for number in range(6)))
        assert engine.status.deaths == 1
    for (text, end), (expected_text, expected_end) in zip(killed, expected, strict=True):
        assert isinstance(end, Finished)
        assert isinstance(expected_end, Finished)
        assert (text, end.choices) == (expected_text, expected_end.choices)


async def test_a_poison_prompt_ends_alone_with_crash_loop(tmp_path: Path) -> None:
    directory = write_model_dir(tmp_path)
    async with serving(directory, pace=200.0, fault="poison@265") as (generation, engine):
        neighbour = asyncio.create_task(generate(generation, 1))
        stream = await generation.start(
            PromptRequest(token_ids=(265,)), Call(request_id="bad", transport="kafka", parent=Context())
        )
        async with asyncio.timeout(60):
            end = [event async for event in stream][-1]
            _, neighbours_end = await neighbour
        assert isinstance(end, Failed)
        assert end.error.code == "crash_loop"
        assert isinstance(neighbours_end, Finished)
        assert engine.status.deaths == 2
