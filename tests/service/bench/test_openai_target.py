"""An OpenAI-compatible endpoint, as a few kinds of server speak it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from service.bench.http_stream import events
from service.bench.openai_target import OpenAiTarget
from service.bench.target import Answer, TargetError
from service.bench.workload import Planned
from service.errors import SetupError

PLANNED = Planned(index=0, text="hello there", max_tokens=3, seed=5)
MODELS = b'{"data": [{"id": "tiny"}]}'
Answers = Callable[[str, dict], tuple[int, list[bytes]]]


def event(value: dict | str) -> bytes:
    return b"data: " + (value if isinstance(value, str) else json.dumps(value)).encode() + b"\n\n"


def chat(text: str) -> dict:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}}


class Server:
    """HTTP/1.1 with chunked bodies; `answers` gives status and pieces for (path, request body)."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self.bodies: list[dict] = []
        self.heads: list[str] = []
        self.num_connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                self.heads.append(head)
                length = next((int(line[15:]) for line in head.lower().split("\r\n") if line.startswith("content-length:")), 0)
                body = json.loads(await reader.readexactly(length) or b"{}")
                self.bodies.append(body)
                status, pieces = self._answers(head.split()[1], body)
                writer.write(f"HTTP/1.1 {status} X\r\ntransfer-encoding: chunked\r\n\r\n".encode())
                for piece in pieces:
                    writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                    await writer.drain()
                writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client, or the test, has ended
        finally:
            writer.close()


@asynccontextmanager
async def target_of(answers: Answers, **options: object) -> AsyncIterator[tuple[OpenAiTarget, Server]]:
    server = Server(lambda path, body: (200, [MODELS]) if path == "/v1/models" else answers(path, body))
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        target = OpenAiTarget(f"http://127.0.0.1:{port}/v1/", **options)  # type: ignore[arg-type]
        await target.open()
        try:
            yield target, server
        finally:
            await target.close()


async def ask(target: OpenAiTarget) -> tuple[Answer, list[int]]:
    arrivals: list[int] = []
    async with asyncio.timeout(10):
        return await target.ask(PLANNED, arrivals.append), arrivals


async def test_a_chat_is_asked_streamed_and_counted() -> None:
    pieces = [
        event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}),
        event(chat("a")),
        event(chat("bc")),
        event(USAGE),
        event("[DONE]"),
    ]
    async with target_of(lambda path, body: (200, pieces)) as (target, server):
        answer, arrivals = await ask(target)
    assert answer == Answer(prompt_tokens=9, completion_tokens=3, cached_prompt_tokens=4)
    assert arrivals == [1, 1]
    assert server.heads[-1].startswith("POST /v1/chat/completions ")
    assert server.bodies[-1] == {
        "model": "tiny",
        "max_tokens": 3,
        "temperature": 0.0,
        "seed": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "hello there"}],
        "ignore_eos": True,
    }


async def test_completions_take_the_text_as_it_is_and_a_key_goes_along() -> None:
    pieces = [event({"choices": [{"text": "a"}]}), event("[DONE]")]
    options = {"endpoint": "completions", "api_key": "not-a-real-key", "ignore_eos": False}
    async with target_of(lambda path, body: (200, pieces), **options) as (target, server):
        answer, _ = await ask(target)
    assert answer == Answer(prompt_tokens=0, completion_tokens=1)
    assert (server.bodies[-1]["prompt"], "ignore_eos" in server.bodies[-1]) == ("hello there", False)
    assert "authorization: Bearer not-a-real-key" in server.heads[-1]


async def test_a_choice_that_says_why_it_ended_has_ended() -> None:
    last = {"choices": [{"delta": {}, "finish_reason": "length"}]}
    async with target_of(lambda path, body: (200, [event(chat("a")), event(last)])) as (target, _):
        answer, _ = await ask(target)
    assert answer == Answer(prompt_tokens=0, completion_tokens=1)


async def test_a_connection_is_used_again_after_an_answer_and_after_a_refusal() -> None:
    statuses = iter([200, 429, 200])

    def answers(path: str, body: dict) -> tuple[int, list[bytes]]:
        status = next(statuses)
        return status, [event(chat("a")), event("[DONE]")] if status == 200 else [
            b'{"error": {"code": "overloaded", "message": "full"}}'
        ]

    async with target_of(answers) as (target, server):
        await ask(target)
        with pytest.raises(TargetError, match="full") as refused:
            await ask(target)
        await ask(target)
    assert (refused.value.code, server.num_connections) == ("overloaded", 1)


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (400, b'{"error": {"code": 400, "type": "BadRequestError", "message": "no"}}', "BadRequestError"),
        (503, b"<html>busy</html>", "http_503"),
        (500, b'{"error": {"message": "no"}}', "http_500"),
        (200, event({"error": {"code": "engine_failed", "message": "no"}}), "engine_failed"),
        (200, event("nonsense"), "internal"),
        (200, event(chat("a")), "internal"),
        (200, b'{"choices": [{"message": {"content": "all of it"}}]}', "internal"),
    ],
)
async def test_a_failure_has_the_servers_own_code(status: int, body: bytes, code: str) -> None:
    async with target_of(lambda path, _: (status, [body])) as (target, _):
        with pytest.raises(TargetError) as failed:
            await ask(target)
    assert failed.value.code == code


async def test_a_server_that_goes_away_is_unavailable() -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n5\r\nda")
        writer.close()

    async with await asyncio.start_server(cut, "127.0.0.1", 0) as listening:
        target = OpenAiTarget(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1", model="m")
        with pytest.raises(TargetError) as failed:
            await ask(target)
    assert failed.value.code == "unavailable"


async def test_nobody_there_and_no_model_are_told_apart() -> None:
    with pytest.raises(SetupError, match=r"nothing answers at http://127\.0\.0\.1:9/v1") as nobody:
        await OpenAiTarget("http://127.0.0.1:9/v1").open()
    assert nobody.value.exit_code == 3


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host/v1", "http://", "http://host:port/v1"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(SetupError, match="write it as http://host:port/v1"):
        OpenAiTarget(url)


@pytest.mark.parametrize("size", [1, 2, 7, 1_000])
async def test_events_are_found_however_the_bytes_are_cut(size: int) -> None:
    raw = ": comment\r\n\r\ndata: one\r\n\r\nevent: x\ndata: zwei ü\ndata:three\n\n".encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(raw), size):
            yield raw[start : start + size]

    assert [found async for found in events(pieces())] == ["one", "zwei ü\nthree"]
