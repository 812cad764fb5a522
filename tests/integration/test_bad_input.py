"""Whatever comes in is answered with a typed error that names what is wrong, and the next request is served."""

import json
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from schemas.v1 import inference_pb2
from service.rpc.client import SluiceClient
from service.rpc.status import error_of
from tests.engine.tiny_model import write_tiny_model
from tests.integration.app_harness import app_of, greedy, run, settings, tokens_of
from tests.integration.kafka_harness import Broker
from tests.service.tiny_tokenizer import write_model_dir

CONTEXT = 256
SMALL = {"stand_in_max_model_len": CONTEXT}

JSON_FAULTS: dict[str, tuple[bytes, str, str]] = {
    "broken UTF-8": (b'{"prompt": "\xff\xfe"}', "invalid_json", ""),
    "no JSON": (b"What is the capital of France?", "invalid_json", ""),
    "no object": (b'["a"]', "invalid_json", ""),
    "nothing": (b"", "invalid_json", ""),
    "deep nesting": (b'{"prompt": ' + b"[" * 100_000, "invalid_json", ""),
    "duplicate key": (b'{"prompt": "a", "prompt": "b"}', "invalid_json", "prompt"),
    "duplicate key below": (b'{"prompt": "a", "sampling": {"top_p": 1, "top_p": 1}}', "invalid_json", "top_p"),
    "unknown key": (b'{"prompt": "a", "promt": "b"}', "unknown_field", "promt"),
    "unknown key below": (b'{"prompt": "a", "sampling": {"max_token": 1}}', "unknown_field", "sampling.max_token"),
    "no prompt": (b"{}", "invalid_field", "prompt"),
    "empty prompt": (b'{"prompt": ""}', "invalid_field", "prompt"),
    "two inputs": (b'{"prompt": "a", "token_ids": [1]}', "invalid_field", "token_ids"),
    "surrogate": (b'{"prompt": "\\ud800"}', "invalid_field", "prompt"),
    "wrong type": (b'{"prompt": 7}', "invalid_field", "prompt"),
    "negative count": (b'{"prompt": "a", "sampling": {"max_tokens": -1}}', "invalid_field", "sampling.max_tokens"),
    "zero": (b'{"prompt": "a", "sampling": {"max_tokens": 0}}', "invalid_field", "sampling.max_tokens"),
    "huge number": (b'{"prompt": "a", "sampling": {"max_tokens": 1e400}}', "invalid_field", "sampling.max_tokens"),
    "many digits": (
        b'{"prompt": "a", "sampling": {"seed": ' + b"9" * 5000 + b"}}", "invalid_field", "sampling.seed",
    ),
    "NaN": (b'{"prompt": "a", "sampling": {"top_p": NaN}}', "invalid_field", "sampling.top_p"),
    "infinity": (b'{"prompt": "a", "sampling": {"temperature": -Infinity}}', "invalid_field", "sampling.temperature"),
    "out of range": (b'{"prompt": "a", "sampling": {"top_p": 1.5}}', "invalid_field", "sampling.top_p"),
    "many choices": (b'{"prompt": "a", "sampling": {"n": 4000000000}}', "invalid_field", "sampling.n"),
    "token outside the vocabulary": (b'{"token_ids": [99999999]}', "invalid_field", "token_ids"),
    "unknown model": (b'{"prompt": "a", "model": "gpt-9"}', "unknown_model", "model"),
    "longer than the context": (
        json.dumps({"prompt": "x" * (CONTEXT + 1)}).encode(), "prompt_too_long", "prompt",
    ),
    "can never fit": (
        b'{"prompt": "a", "sampling": {"max_tokens": 256}}', "too_many_tokens", "sampling.max_tokens",
    ),
}  # fmt: skip
HEADER_FAULTS: dict[str, tuple[dict[str, bytes], str, str]] = {
    "content type": ({"content-type": b"text/plain"}, "unsupported_content_type", "content-type"),
    "no protobuf": ({"content-type": b"application/x-protobuf"}, "invalid_protobuf", ""),
    "deadline": ({"sluice-deadline": b"tomorrow"}, "invalid_field", "sluice-deadline"),
    "time to live": ({"sluice-ttl-ms": b"-5"}, "invalid_field", "sluice-ttl-ms"),
    "reply topic": ({"sluice-reply-to": b"elsewhere"}, "reply_to_refused", "sluice-reply-to"),
}
GOOD = json.dumps({"prompt": "good", "sampling": {"max_tokens": 3, "seed": 1}}).encode()


@pytest.mark.kafka
async def test_over_kafka_each_ends_in_a_failed_result_and_a_dead_letter_and_the_next_is_served(
    tiny_model_dir: Path, topics_of_its_own: Broker
) -> None:
    broker = topics_of_its_own
    async with app_of(settings(tiny_model_dir, broker=broker, engine=SMALL)):
        for value, _, _ in JSON_FAULTS.values():
            await broker.publish(value, GOOD)
        for headers, _, _ in HEADER_FAULTS.values():
            await broker.publish(b'{"prompt": "a"}', headers=headers)
            await broker.publish(GOOD)
        faults = {**JSON_FAULTS, **HEADER_FAULTS}
        results = [read(record) for record in await broker.read(broker.topics.results, count=2 * len(faults))]
        letters = await broker.read(broker.topics.dead_letters, count=len(faults))
    by_offset = {int(result["source"]["offset"]): result for result in results}
    seen = {name: shown(by_offset[2 * index]["error"], faults[name][2]) for index, name in enumerate(faults)}
    assert seen == {name: (code, field) for name, (_, code, field) in faults.items()}
    assert [by_offset[2 * index + 1]["status"] for index in range(len(faults))] == ["finished"] * len(faults)
    dead = {int(letter["source"]["offset"]): letter["error"]["code"] for letter in (json.loads(r.value()) for r in letters)}
    assert dead == {2 * index: code for index, (_, code, _) in enumerate(faults.values())}
    assert len(results) == 2 * len(faults)


def read(record: Any) -> dict[str, Any]:
    """A result as JSON has it; a prompt that came as protobuf is answered in protobuf."""
    if dict(record.headers())["content-type"] == b"application/json":
        return json.loads(record.value())
    return json_format.MessageToDict(inference_pb2.Result.FromString(record.value()), preserving_proto_field_name=True)


def shown(error: dict[str, Any], field: str) -> tuple[str, str]:
    """The code, and the field where the error names it, in its own place or in its words."""
    named = field in error.get("field", "") or field in error["message"]
    return error["code"], field if named else f"not named: {error}"


@pytest.mark.kafka
async def test_a_tombstone_is_passed_over_without_a_result(tiny_model_dir: Path, topics_of_its_own: Broker) -> None:
    broker = topics_of_its_own
    async with app_of(settings(tiny_model_dir, broker=broker)):
        await broker.publish(None, GOOD)
        results = await broker.results(1)
    assert [(result["source"]["offset"], result["status"]) for result in results] == [("1", "finished")]


def proto(**fields: Any) -> bytes:
    return inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(**fields)).SerializeToString()


def sampled(**fields: Any) -> bytes:
    return proto(prompt="a", sampling=inference_pb2.Sampling(**fields))


GRPC_FAULTS: dict[str, tuple[bytes, str, str]] = {
    "no protobuf": (b"\xff\xff\xff", "invalid_protobuf", ""),
    "broken UTF-8": (b"\x0a\x04\x0a\x02\xff\xfe", "invalid_protobuf", ""),
    "no prompt": (b"", "invalid_field", "prompt"),
    "empty prompt": (proto(prompt=""), "invalid_field", "prompt"),
    "empty messages": (proto(messages=inference_pb2.ChatMessages()), "invalid_field", "messages"),
    "huge count": (sampled(max_tokens=4_294_967_295), "too_many_tokens", "sampling.max_tokens"),
    "NaN": (sampled(temperature=float("nan")), "invalid_field", "sampling.temperature"),
    "infinity": (sampled(top_p=float("inf")), "invalid_field", "sampling.top_p"),
    "negative": (sampled(repetition_penalty=-1.0), "invalid_field", "sampling.repetition_penalty"),
    "unknown model": (proto(prompt="a", model="gpt-9"), "unknown_model", "model"),
    "longer than the context": (proto(prompt="x" * 300), "prompt_too_long", "prompt"),
    "can never fit": (sampled(max_tokens=CONTEXT), "too_many_tokens", "sampling.max_tokens"),
}


async def test_over_grpc_each_is_a_status_that_names_the_field_and_the_next_is_served(tiny_model_dir: Path) -> None:
    seen: dict[str, tuple[str, str]] = {}
    async with (
        app_of(settings(tiny_model_dir, engine=SMALL)) as app,
        SluiceClient(app.endpoints.grpc) as client,
        grpc.aio.insecure_channel(app.endpoints.grpc) as channel,
    ):
        raw = channel.unary_unary("/sluice.v1.Inference/Generate")
        for name, (value, _, _) in GRPC_FAULTS.items():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raw(value, timeout=30)
            details = error_of(tuple(caught.value.trailing_metadata()))
            assert details is not None, caught.value
            seen[name] = (details[0].code, details[0].field)
            assert len(await tokens_of(client, greedy("good", 3))) == 3
    assert seen == {name: (code, field) for name, (_, code, field) in GRPC_FAULTS.items()}


@pytest.mark.parametrize("section", ["grpc", "admin"])
async def test_a_port_in_use_is_named_before_the_model_is_loaded(tiny_model_dir: Path, section: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        free = {"grpc": 0, "admin": 0} | {section: port}
        sets = [part for name, value in free.items() for part in ("--set", f"{name}.port={value}")]
        code, out, errors = await run(
            "serve", "--model", str(tiny_model_dir), "--set", "engine.kind=stand-in", "--set", "kafka.enabled=false", *sets
        )
    assert (code, out) == (2, "")
    assert f"cannot listen on {section}.host:{section}.port 127.0.0.1:{port}" in errors
    assert one_error(errors)


async def test_equal_ports_are_named_before_the_model_is_loaded(tiny_model_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    code, out, errors = await run(
        "serve", "--model", str(tiny_model_dir), "--set", "engine.kind=stand-in", "--set", "kafka.enabled=false",
        "--set", f"grpc.port={port}", "--set", f"admin.port={port}",
    )  # fmt: skip
    assert (code, out) == (2, "")
    # The first to listen, before loading, is the admin server; gRPC's would be named after it.
    assert f"cannot listen on admin.host:admin.port 127.0.0.1:{port}" in errors
    assert one_error(errors)


@pytest.mark.parametrize("section", ["grpc", "admin"])
@pytest.mark.parametrize(
    ("host", "why"), [("nosuch.host.invalid", "Name or service not known"), ("192.0.2.1", "Cannot assign")]
)
async def test_a_host_that_is_not_this_machine_is_named_with_the_setting(
    tiny_model_dir: Path, section: str, host: str, why: str
) -> None:
    code, out, errors = await run(
        "serve", "--model", str(tiny_model_dir), "--set", "engine.kind=stand-in", "--set", "kafka.enabled=false",
        "--set", "grpc.port=0", "--set", "admin.port=0", "--set", f"{section}.host={host}",
    )  # fmt: skip
    assert (code, out) == (2, "")
    assert f"{section}.host:{section}.port {host}:0 ({why}" in errors
    assert f"set {section}.host to an address of this machine" in errors
    assert one_error(errors)


def one_error(errors: str) -> bool:
    """Nothing but one message for a person."""
    return errors.startswith("error: ") and "Traceback" not in errors and errors.count("error: ") == 1


def without_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def truncated(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def terabytes(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 42) + b"{}")


def foreign(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}))


def no_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_tokenizer, ("tokenizer.json",)),
        (truncated, ("model.safetensors", "truncated")),
        (terabytes, ("model.safetensors", "claims a header of 4398046511104 bytes")),
        (foreign, ("config.json", "MambaForCausalLM")),
        (no_config, ("config.json", "JSON")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_a_broken_model_directory_is_one_error_that_names_the_file(
    tmp_path: Path, spoil: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    write_model_dir(tmp_path)
    write_tiny_model(tmp_path)
    spoil(tmp_path)
    code, out, errors = await run("generate", "hello", "--model", str(tmp_path), "--set", "engine.num_threads=1")
    assert (code, out) == (2, "")
    assert one_error(errors)
    for word in words:
        assert word in errors
