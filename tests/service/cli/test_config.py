"""`sluice config`, and how file, environment and flags override each other."""

import json
import tomllib
from pathlib import Path

import pytest

from service.cli.config import render_toml
from service.config import Settings
from tests.service.cli.cli_run import Sluice

SHIPPED = Path(__file__).resolve().parents[3] / "deploy" / "sluice.toml"


def test_the_shipped_file_is_what_config_show_prints(sluice: Sluice) -> None:
    assert sluice.run("config", "show") == (0, SHIPPED.read_text("utf-8"), "")


def test_every_setting_is_explained() -> None:
    unexplained = [
        f"{section}.{name}"
        for section in Settings.model_fields
        for name, field in type(getattr(Settings(), section)).model_fields.items()
        if not (field.description or "").strip()
    ]
    assert unexplained == []


def test_what_show_prints_is_a_valid_file_of_the_same_settings(sluice: Sluice, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(render_toml(Settings()).replace("port = 50051", "port = 50052"))
    code, out, _ = sluice.run("config", "show", "--json", "--config", str(file))
    expected = Settings().model_dump(mode="json")
    expected["grpc"]["port"] = 50052
    assert (code, json.loads(out)) == (0, expected)


def test_flags_override_the_environment_which_overrides_the_file(sluice: Sluice, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("[grpc]\nport = 1\n[admin]\nport = 1\n[http]\nport = 1\n")
    environment = {"SLUICE_GRPC__PORT": "2", "SLUICE_ADMIN__PORT": "2"}
    _, out, _ = sluice.run("config", "show", "-c", str(file), "--set", "grpc.port=3", environment=environment)
    found = tomllib.loads(out)
    assert (found["grpc"]["port"], found["admin"]["port"], found["http"]["port"]) == (3, 2, 1)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLUICE_HTTP__ENABLED": "false"},
        {"SLUICE_TRACING__OTLP_ENDPOINT": "https://[::1]:4317"},
        {"SLUICE_TRACING__OTLP_ENDPOINT": "http://collector:4317"},
    ],
)
def test_a_valid_configuration_exits_with_0(sluice: Sluice, environment: dict[str, str]) -> None:
    assert sluice.run("config", "check", "--json", environment=environment) == (0, '{"valid": true}\n', "")


FAULTS = {
    "unknown key": (["--set", "grpc.prot=1"], {}, ["grpc.prot: unknown key; did you mean grpc.port?"]),
    "unknown section": (["--set", "grcp.port=1"], {}, ["grcp", "unknown key"]),
    "unknown variable": ([], {"SLUICE_GRPC__PRT": "1"}, ["SLUICE_GRPC__PRT", "did you mean grpc.port?"]),
    "one underscore": ([], {"SLUICE_GRPC_PORT": "50099"}, ["SLUICE_GRPC_PORT: ", "did you mean SLUICE_GRPC__PORT?"]),
    "a list that is no JSON": (
        [],
        {"SLUICE_KAFKA__TOPIC_TENANTS": "a=b"},
        ['SLUICE_KAFKA__TOPIC_TENANTS: a list is written as JSON, as ["one", "two"]'],
    ),
    "a section that is no JSON": ([], {"SLUICE_GRPC": "abc"}, ["SLUICE_GRPC: a whole section is written as JSON"]),
    "a port of true": (["--set", "grpc.port=true"], {}, ["grpc.port: must be a number, not true or false"]),
    "a time of true": (["--set", "kafka.sasl_oauth_refresh_s=true"], {}, ["kafka.sasl_oauth_refresh_s: must be a number"]),
    "not built": (["--set", "http.enabled=true"], {}, ["http.enabled: the HTTP routes are not built yet; leave it out"]),
    "texts on spans": (
        ["--set", "tracing.capture_content=true"],
        {},
        ["tracing.capture_content: texts on spans are not built yet"],
    ),
    "spans of steps": (
        ["--set", "tracing.engine_step_every=5"],
        {},
        ["tracing.engine_step_every: spans of engine steps are not built yet; leave it out"],
    ),
    "no collector": (
        ["--set", "tracing.otlp_endpoint=nonsense"],
        {},
        ["tracing.otlp_endpoint: 'nonsense': write it as host:port"],
    ),
    "two at once": (["--set", "grpc.port=-1", "--set", "admin.port=x"], {}, ["grpc.port: ", "admin.port: "]),
    "huge number": (["--set", "grpc.port=999999999999999999999"], {}, ["grpc.port: ", "65535"]),
    "too many threads": (["--set", "engine.num_threads=1025"], {}, ["engine.num_threads: ", "1024"]),
    "too many sequences": (["--set", "engine.max_num_seqs=65537"], {}, ["engine.max_num_seqs: ", "65536"]),
    "NaN": (["--set", "engine.hang_timeout_s=nan"], {}, ["engine.hang_timeout_s: "]),
    "infinity": (["--set", "grpc.heartbeat_s=inf"], {}, ["grpc.heartbeat_s: ", "finite"]),
    "a pair that is none": (["--set", 'kafka.topic_tenants=["a"]'], {}, ["kafka.topic_tenants: ", "write it as topic=tenant"]),
    "a topic twice": (
        ["--set", 'kafka.topic_tenants=["a=x", "b=x", "a=y"]'],
        {},
        ["kafka.topic_tenants: a=y: a has been given to x already; name each topic once"],
    ),
    "no value": (["--set", "grpc.port"], {}, ["write it as section.field=value"]),
    "no file": (["--config", "/nowhere/sluice.toml"], {}, ["cannot read /nowhere/sluice.toml", "--config"]),
}


@pytest.mark.parametrize(("arguments", "environment", "words"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_configuration_names_every_key_and_exits_with_2(
    sluice: Sluice, arguments: list[str], environment: dict[str, str], words: list[str]
) -> None:
    code, out, errors = sluice.run("config", "check", *arguments, environment=environment)
    assert (code, out) == (2, "")
    assert [word for word in words if word not in errors] == []


def test_variables_that_are_no_settings_are_left_alone(sluice: Sluice) -> None:
    of_a_service_called_sluice_grpc = {
        "SLUICE_GRPC_SERVICE_HOST": "10.0.0.1",
        "SLUICE_GRPC_SERVICE_PORT_RPC": "50051",
        "SLUICE_GRPC_PORT": "tcp://10.0.0.1:50051",
        "SLUICE_GRPC_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "SLUICE_GRPC_PORT_50051_TCP_ADDR": "10.0.0.1",
    }
    environment = {"SLUICE_CACHE": "/tmp", "SLUICE_STAND_IN_FAULT": "exit@5", **of_a_service_called_sluice_grpc}
    assert sluice.run("config", "check", "--json", environment=environment) == (0, '{"valid": true}\n', "")


@pytest.mark.parametrize("content", [b"[grpc\n", b"\xff\xfe", b"[grpc]\nport = 1\nport = 2\n"])
def test_a_file_that_is_no_toml_is_named(sluice: Sluice, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "own.toml"
    file.write_bytes(content)
    code, _, errors = sluice.run("config", "check", "--config", str(file))
    assert code == 2
    assert "own.toml is not valid TOML" in errors.replace("\n", "")
