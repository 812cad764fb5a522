"""Any OpenAI-compatible endpoint: streamed `chat/completions` (or `completions`), with usage in the last event.

Tokens are counted by the messages that bring text until the usage says how many there were: what comes in one message arrived together.
"""

import json
from typing import Any
from urllib.parse import urlsplit

from service.bench.http_stream import HttpClient, HttpError, events, whole
from service.bench.target import TEMPERATURE, Answer, OnTokens, TargetError
from service.bench.workload import Planned
from service.errors import SetupError

Endpoint = str
ENDPOINTS: tuple[Endpoint, ...] = ("chat/completions", "completions")


class OpenAiTarget:
    """`url`: the base that `/chat/completions` is added to, as https://host/v1. `api_key`: sent as a bearer token where given."""

    def __init__(
        self, url: str, *, endpoint: Endpoint = ENDPOINTS[0], model: str = "", api_key: str = "", ignore_eos: bool = True
    ) -> None:
        """Raises `SetupError`."""
        try:
            parts = urlsplit(url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            sound = False
        if not sound:
            raise SetupError(f"--url {url}: write it as http://host:port/v1")
        self._url = url.rstrip("/")
        self._base = parts.path.rstrip("/")
        self._endpoint = endpoint
        self._model = model
        self._ignore_eos = ignore_eos
        self._client = HttpClient(url, {"authorization": f"Bearer {api_key}"} if api_key else {})

    async def open(self) -> dict[str, Any]:
        try:
            async with self._client.request("GET", f"{self._base}/models") as response:
                body = await whole(response.body)
        except HttpError as error:
            raise SetupError(f"nothing answers at {self._url} ({error}); is the server running?", exit_code=3) from error
        if response.status in (401, 403):
            raise SetupError(f"{self._url} wants an API key (HTTP {response.status}); set OPENAI_API_KEY")
        models = _model_names(body) if response.status == 200 else []
        if not self._model:
            if not models:
                raise SetupError(f"{self._url}/models names no model (HTTP {response.status}); name one with --model")
            self._model = models[0]
        return {"target": self._url, "endpoint": self._endpoint, "model": self._model, "models": models}

    async def ask(self, planned: Planned, on_tokens: OnTokens) -> Answer:
        try:
            async with self._client.request("POST", f"{self._base}/{self._endpoint}", self._body(planned)) as response:
                if response.status != 200:
                    raise _refusal(response.status, await whole(response.body))
                return await self._follow(events(response.body), on_tokens)
        except HttpError as error:
            raise TargetError("unavailable", str(error)) from error

    async def close(self) -> None:
        await self._client.close()

    def _body(self, planned: Planned) -> bytes:
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": planned.max_tokens,
            "temperature": TEMPERATURE,
            "seed": planned.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._endpoint == "completions":
            body["prompt"] = planned.text
        else:
            body["messages"] = [{"role": "user", "content": planned.text}]
        if self._ignore_eos:
            # No field of OpenAI's own: vLLM, SGLang, llama.cpp and Sluice know it.
            body["ignore_eos"] = True
        return json.dumps(body).encode()

    async def _follow(self, stream: Any, on_tokens: OnTokens) -> Answer:
        num_messages, usage, ended = 0, None, False
        async for data in stream:
            if data == "[DONE]":
                ended = True
                continue
            try:
                event = json.loads(data)
            except ValueError:
                raise TargetError("internal", "an event that is no JSON") from None
            if "error" in event:
                raise _failure(event["error"])
            usage = event.get("usage") or usage
            choices = event.get("choices") or ()
            ended = ended or any(choice.get("finish_reason") for choice in choices)
            if any(_text(choice) for choice in choices):
                num_messages += 1
                on_tokens(1)
        if not ended:
            raise TargetError("internal", "the stream ended without a result")
        if usage is None:
            return Answer(prompt_tokens=0, completion_tokens=num_messages)
        details = usage.get("prompt_tokens_details") or {}
        return Answer(
            prompt_tokens=usage.get("prompt_tokens") or 0,
            completion_tokens=usage.get("completion_tokens") or num_messages,
            cached_prompt_tokens=details.get("cached_tokens") or 0,
        )


def _text(choice: dict[str, Any]) -> str:
    delta = choice.get("delta") or {}
    return choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""


def _model_names(body: bytes) -> list[str]:
    try:
        return [str(model["id"]) for model in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError):
        return []


def _refusal(status: int, body: bytes) -> TargetError:
    try:
        value = json.loads(body)
    except ValueError:
        return TargetError(f"http_{status}")
    error = value.get("error", value) if isinstance(value, dict) else {}
    failure = _failure(error)
    return failure if failure.code != "internal" else TargetError(f"http_{status}", str(failure))


def _failure(error: Any) -> TargetError:
    """Of an error object, whose `code` is a word at some servers and the HTTP status at others."""
    if not isinstance(error, dict):
        return TargetError("internal", str(error)[:200])
    code = error.get("code") if isinstance(error.get("code"), str) else error.get("type")
    return TargetError(str(code or "internal"), str(error.get("message", ""))[:200])
