"""Commands that need no server: what they print and how they exit."""

import io
import json
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from aiokafka.errors import CorruptRecordException, KafkaConnectionError, KafkaError

from service.cli import doctor
from service.cli.kafka import refused
from service.config import Settings
from tests.bench.tiny import write_tiny_model
from tests.service.cli.cli_run import Sluice
from tests.service.tiny_tokenizer import write_model_dir


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_generate_gives_text_tokens_usage_and_timings_as_json(sluice: Sluice, stand_in: list[str]) -> None:
    code, out, errors = sluice.run("generate", "hello", "--raw", "--max-tokens", "4", "--seed", "3", "--json", *stand_in)
    answer = json.loads(out)
    assert (code, errors) == (0, "")
    assert (len(answer["token_ids"]), answer["finish_reason"], answer["seed"]) == (4, "length", 3)
    assert answer["usage"] == {"prompt_tokens": 1, "cached_prompt_tokens": 0, "completion_tokens": 4}
    assert set(answer["timings"]) == {"queue_ms", "ttft_ms", "tpot_ms", "total_ms"}


def test_generate_prints_token_ids_when_asked(sluice: Sluice, stand_in: list[str]) -> None:
    common = ("generate", "hello", "--max-tokens", "4", "--seed", "3", *stand_in)
    _, as_json, _ = sluice.run(*common, "--json")
    _, out, _ = sluice.run(*common, "--token-ids")
    assert [int(word) for word in out.split()] == json.loads(as_json)["token_ids"]


def test_the_chat_template_is_applied_unless_raw(sluice: Sluice, stand_in: list[str]) -> None:
    common = ("generate", "hello", "--max-tokens", "1", "--json", *stand_in)
    counts = [json.loads(sluice.run(*common, *extra)[1])["usage"]["prompt_tokens"] for extra in ((), ("--raw",))]
    assert counts[0] > counts[1] == 1


WRONG = {
    "empty prompt": (["generate", ""], 2, "the prompt is empty"),
    "negative": (["generate", "a", "--max-tokens", "-1"], 2, "--max-tokens"),
    "no number": (["generate", "a", "--temperature", "warm"], 2, "--temperature"),
    "out of range": (["generate", "a", "--top-p", "7"], 2, "sampling.top_p"),
    "NaN": (["generate", "a", "--top-p", "nan"], 2, "sampling.top_p"),
    "more than a message holds": (
        ["stream", "a", "--max-tokens", "9999999999999"],
        2,
        "sampling.max_tokens: must lie in [1, 2^32",
    ),
    "no seed": (["publish", "a", "--seed", "99999999999999999999999"], 2, "sampling.seed: must lie in [0, 2^63 - 1]"),
    "no ASCII": (["submit", "a", "--idempotency-key", "é"], 2, "idempotency_key: must be printable ASCII"),
    "a key of no UTF-8": (["submit", "a", "--key", "\udcff"], 2, "--key: holds an unpaired surrogate"),
    "a record's key of no UTF-8": (["publish", "a", "--key", "\udcff"], 2, "--key: holds an unpaired surrogate"),
    "a class of no UTF-8": (["submit", "a", "--class", "\udcff"], 2, "--class: holds an unpaired surrogate"),
    "an id of no UTF-8": (["get", "\udcff"], 2, "request_id: holds an unpaired surrogate"),
    "can never fit": (["generate", "a", "--max-tokens", "100000"], 1, "too_many_tokens: sampling.max_tokens"),
    "longer than the context": (["generate", "x" * 9000], 1, "prompt_too_long"),
    "nothing to publish": (["publish"], 2, "give TEXT"),
    "no such class": (["publish", "a", "--class", "urgent"], 2, "queue_class: must be one of interactive, standard, batch"),
    "no broker's address": (["publish", "a", "--brokers", "nonsense"], 2, "kafka.bootstrap_servers: 'nonsense': write it as"),
    "no such port": (["topics", "check", "--brokers", "a:9092,b:99999"], 2, "'b:99999': a port lies between"),
    "no broker": (["serve", "--brokers", ""], 2, "kafka.bootstrap_servers: '': write it as host:port"),
    "no replica's address": (["stream", "a", "--target", "localhost"], 2, "--target 'localhost': write it as host:port"),
    "no replica's port": (["get", "a-0-1", "--target", "127.0.0.1:99999"], 2, "a port lies between 1 and 65535"),
    "a file and a text": (["publish", "a", "--file", "x"], 2, "--file holds whole prompts"),
    "a file and an option": (["publish", "--file", "x", "--max-tokens", "3"], 2, "--file holds whole prompts"),
    "an empty file": (["publish", "--file", "/dev/null"], 2, "/dev/null holds no prompt"),
    "no file": (["publish", "--file", "/nowhere/x"], 2, "cannot read /nowhere/x: No such file or directory"),
    "tail from nowhere": (["tail", "--from", "banana"], 2, "--from banana"),
    "raw results": (["tail", "--raw"], 2, "--raw goes with --chunks"),
    "no target": (["get", "a-0-1", "--target", ","], 2, "--target"),
    "nobody there": (["attach", "a-0-1", "--target", "127.0.0.1:1"], 3, "is a replica running at 127.0.0.1:1?"),
    "more tokens than there can be": (
        ["attach", "a-0-1", "--after-seq", "99999999999"],
        2,
        "Invalid value for '--after-seq'",
    ),
    "no such format": (["generate", "a", "--quantize", "int3"], 2, "'int3' is not one of 'int8', 'int4'"),
    "no such format to serve": (["serve", "--quantize", "int3"], 2, "'int3' is not one of 'int8', 'int4'"),
    "no such command": (["nonsense"], 2, "nonsense"),
}


@pytest.mark.parametrize(("arguments", "exit_code", "words"), WRONG.values(), ids=WRONG)
def test_wrong_use_is_one_message_and_an_exit_code(
    sluice: Sluice, stand_in: list[str], arguments: list[str], exit_code: int, words: str
) -> None:
    extra = stand_in if arguments[0] == "generate" else []
    code, out, errors = sluice.run(*arguments, *extra)
    assert (code, out, "Traceback" in errors) == (exit_code, "", False)
    assert words in errors


@pytest.mark.parametrize("path", ["/nowhere/model", "/nowhere/model.gguf"])
def test_a_model_that_is_not_there_is_named(sluice: Sluice, path: str, tmp_path: object) -> None:
    command = ["model", "import", path, f"{tmp_path}/out"] if path.endswith("gguf") else ["generate", "a", "--model", path]
    code, _, errors = sluice.run(*command)
    assert code == 2
    assert path in errors


@pytest.mark.parametrize(
    ("command", "wanted"), [(["generate", "a"], "int8"), (["serve", "--json", "--set", "kafka.enabled=false"], "int4")]
)
def test_quantize_reaches_the_engine_which_says_what_it_needs(
    sluice: Sluice, command: list[str], wanted: str, tmp_path: Path
) -> None:
    write_tiny_model(write_model_dir(tmp_path))
    code, out, errors = sluice.run(
        *command, "--quantize", wanted, "--model", str(tmp_path),
        "--set", "engine.cpu_isa=torch", "--set", "model.load_format=dummy", "--set", "grpc.port=0", "--set", "admin.port=0",
    )  # fmt: skip
    assert (code, out) == (2, "")
    assert f"engine.quantize '{wanted}' needs the C++ operators of a CPU" in errors


@pytest.mark.parametrize(
    "command", [["publish", "hi", "--brokers"], ["tail", "--brokers"], ["topics", "check", "--brokers"], ["stream", "hi", "-t"]]
)
def test_an_unreachable_server_is_one_error_and_exit_code_3(sluice: Sluice, command: list[str]) -> None:
    target = f"127.0.0.1:{unused_port()}"
    code, out, errors = sluice.run(*command, target)
    assert (code, out) == (3, "")
    assert errors.startswith("error: ")
    assert target in errors
    assert "make serve" in errors


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (CorruptRecordException("Invalid CRC"), 1, "answered with an error: [Error 2] CorruptRecordException: Invalid CRC"),
        (KafkaConnectionError("gone"), 3, "no Kafka broker answers at 127.0.0.1:19092"),
        (TimeoutError(), 3, "no Kafka broker answers at 127.0.0.1:19092 (TimeoutError)"),
    ],
)
def test_a_broker_that_answers_with_an_error_is_not_called_unreachable(error: KafkaError, code: int, said: str) -> None:
    told = refused(Settings(), error)
    assert (told.exit_code, said in str(told)) == (code, True)


def checks(out: str) -> dict[str, str]:
    return {check["name"]: check["state"] for check in json.loads(out)["checks"]}


@pytest.fixture
def quick_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "BROKER_TIMEOUT_S", 0.5)


@pytest.mark.usefixtures("quick_doctor")
def test_the_doctor_says_3_when_a_server_does_not_answer(sluice: Sluice, stand_in: list[str]) -> None:
    nobody = unused_port()
    code, out, _ = sluice.run(
        "doctor", "--json", "--set", f"kafka.bootstrap_servers=127.0.0.1:{nobody}",
        "--set", f"tracing.otlp_endpoint=127.0.0.1:{nobody}", "--set", "model.load_format=dummy", *stand_in,
    )  # fmt: skip
    found = checks(out)
    assert (code, found["kafka"], found["tracing"], found["model"]) == (3, "fail", "fail", "ok")


def test_the_doctor_says_2_for_a_model_directory_without_weights(sluice: Sluice, stand_in: list[str]) -> None:
    code, out, _ = sluice.run("doctor", "--json", "--set", "kafka.enabled=false", *stand_in)
    assert (code, checks(out)["model"], checks(out)["kafka"]) == (2, "fail", "note")


def test_the_doctor_finds_a_taken_port_and_a_good_machine(sluice: Sluice, stand_in: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, _ = sluice.run(
            "doctor", "--set", f"grpc.port={port}", "--set", "admin.port=0", "--set", "kafka.enabled=false",
            "--set", "model.load_format=dummy", *stand_in,
        )  # fmt: skip
    assert code == 0
    assert f"in use: grpc.port {port}" in out
    assert "fail" not in out


NO_PORTS = ("--set", "grpc.port=0", "--set", "admin.port=0", "--set", "kafka.enabled=false", "--set", "model.load_format=dummy")


@pytest.mark.parametrize(
    ("asked", "check", "said"),
    [
        ("engine.device=quantum", "compute", "engine.device 'quantum' is no device"),
        ("engine.attention_backend=flash", "compute", "engine.attention_backend 'flash' is unknown"),
        ("engine.max_model_len=100000", "compute", "the model was made for 4096 tokens"),
        ("engine.quantize=int8", "compute", "engine.quantize 'int8' needs the C++ operators of a CPU"),
        ("engine.kv_cache_dtype=int8", "compute", "engine.kv_cache_dtype int8 needs the C++ operators of a CPU"),
        ("grpc.host=192.0.2.1", "ports", "set grpc.host to an address of this machine"),
        ("admin.host=nosuch.host.invalid", "ports", "(Name or service not known); set admin.host to"),
    ],
)
def test_the_doctor_refuses_what_serve_refuses(sluice: Sluice, asked: str, check: str, said: str, tmp_path: Path) -> None:
    write_tiny_model(write_model_dir(tmp_path))
    code, out, _ = sluice.run(
        "doctor", "--json", "--set", f"model.path={tmp_path}", "--set", "engine.cpu_isa=torch", *NO_PORTS, "--set", asked
    )
    assert (code, {name for name, state in checks(out).items() if state == "fail"}) == (2, {check})
    assert said in next(found["detail"] for found in json.loads(out)["checks"] if found["name"] == check)


def test_the_doctor_refuses_a_model_that_does_not_load(sluice: Sluice, tmp_path: Path) -> None:
    (write_model_dir(tmp_path) / "config.json").write_text("{no JSON")
    code, out, _ = sluice.run("doctor", "--set", f"model.path={tmp_path}", "--set", "engine.cpu_isa=torch", *NO_PORTS)
    assert code == 2
    assert "config.json: is not valid JSON" in out


def test_the_doctor_refuses_one_port_for_two(sluice: Sluice, stand_in: list[str]) -> None:
    port = unused_port()
    both = ["--set", f"grpc.port={port}", "--set", f"admin.port={port}"]
    code, out, _ = sluice.run("doctor", "--json", *NO_PORTS, *both, *stand_in)
    assert (code, checks(out)["ports"]) == (2, "fail")


def shell(command: str) -> "subprocess.CompletedProcess[str]":
    """A line of bash in which `sluice` is the command."""
    sluice = f'sluice() {{ {sys.executable} -c "from service.cli.main import main; main()" "$@"; }}'
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run(["bash", "-c", f"{sluice}; {command}"], capture_output=True, text=True, check=True, env=environment)


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = shell("sluice config show | head -1; echo ${PIPESTATUS[0]}")
    first, status = done.stdout.splitlines()
    assert (first[:9], status, done.stderr) == ("# Every s", "0", "")


@pytest.mark.parametrize("arguments", ["config show", "--help"])
def test_nor_is_one_that_was_never_there(arguments: str) -> None:
    # `wait` on the other end of the pipe: it is closed before anything is written.
    done = shell(f"exec 3> >(exec 0<&-); wait $!; sluice {arguments} >&3; echo $?")
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.parametrize("arguments", ["config show", "--version"])
def test_a_full_disk_is_one_message_and_exit_code_1(arguments: str) -> None:
    done = shell(f"sluice {arguments} > /dev/full; echo $?")
    assert (done.stdout, done.stderr) == ("1\n", "error: No space left on device\n")


def test_tables_are_whole_where_nobody_sees_their_edge() -> None:
    table = "from rich.table import Table; from service.cli.output import out; out.print(Table('x' * 500, 'y' * 500, box=None))"
    assert "x" * 500 + "  " + "y" * 500 in shell(f'{sys.executable} -c "{table}"').stdout


@pytest.mark.parametrize("command", [["generate", "-"], ["publish", "-"], ["stream", "-"], ["submit", "-"]])
def test_a_prompt_that_is_no_text_is_said_to_be_none(
    sluice: Sluice, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="latin-1"))
    code, out, errors = sluice.run(*command)
    assert (code, out) == (2, "")
    assert "standard input is no valid UTF-8 at byte 3" in errors


def test_a_prompt_on_standard_input_is_utf_8_whatever_the_terminal_says(
    sluice: Sluice, stand_in: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("é".encode()), encoding="ascii"))
    _, piped, _ = sluice.run("generate", "-", "--raw", "--json", "--max-tokens", "1", "--seed", "1", *stand_in)
    _, typed, _ = sluice.run("generate", "é", "--raw", "--json", "--max-tokens", "1", "--seed", "1", *stand_in)
    assert [json.loads(out)["usage"]["prompt_tokens"] for out in (piped, typed)] == [2, 2]


def test_the_version_is_shown(sluice: Sluice) -> None:
    assert sluice.run("--version") == (0, f"sluice {version('sluice')}\n", "")


def test_looking_for_progress_where_no_broker_is_leaves_nothing_open(sluice: Sluice) -> None:
    code, out, errors = sluice.run("offsets", "show", "--brokers", f"127.0.0.1:{unused_port()}")
    assert (code, out, errors.count("\n"), "Unclosed" in errors) == (3, "", 1, False)
