"""Security settings become client arguments in one place; what cannot work is said by name; secrets show nowhere."""

import json
import ssl
from pathlib import Path
from typing import Any

import pytest

from service.cli.config import render_toml
from service.config import KafkaSection, Settings, load
from service.errors import SetupError
from service.kafka.connection import Connection
from service.kafka.tokens import TokenSource, TokenUnavailableError
from tests.servers.secure_kafka import Certificates

SCRAM = {"security_protocol": "SASL_SSL", "sasl_username": "sluice", "sasl_password": "hush-hush"}
OAUTH = {"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"}


def settings(**kafka: Any) -> Settings:
    return load(None, {"kafka": kafka})


def section(**kafka: Any) -> KafkaSection:
    return settings(**kafka).kafka


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.mark.parametrize(
    ("kafka", "words"),
    [
        ({"security_protocol": "SASL_SSL"}, "kafka: sasl_mechanism SCRAM-SHA-512 needs sasl_username and sasl_password_file"),
        ({**SCRAM, "security_protocol": "SSL"}, "sasl_ settings are of no use with security_protocol SSL"),
        ({"ssl_ca": "ca.pem"}, "of no use with security_protocol PLAINTEXT"),
        ({"security_protocol": "SSL", "ssl_certificate": "a.pem"}, "ssl_certificate and ssl_key go together"),
        ({"security_protocol": "SSL", "ssl_key_password": "a"}, "ssl_key_password is of no use without ssl_key"),
        ({**SCRAM, "sasl_password_file": "b"}, "sasl_password and sasl_password_file are both set"),
        (OAUTH, "needs sasl_oauth_token_file or sasl_oauth_token_command"),
        ({**OAUTH, "sasl_oauth_token_file": "a", "sasl_oauth_token_command": ["b"]}, "are both set"),
        ({**SCRAM, "embedded": True}, "must be PLAINTEXT with the embedded broker"),
        ({"security_protocol": "TLS"}, "kafka.security_protocol: input should be 'PLAINTEXT', 'SSL'"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_by_name(kafka: dict[str, Any], words: str) -> None:
    with pytest.raises(SetupError) as caught:
        section(**kafka)
    assert words in str(caught.value)
    assert "hush-hush" not in str(caught.value)


def test_a_password_shows_nowhere() -> None:
    secret = settings(**SCRAM)
    shown = [repr(secret), render_toml(secret), json.dumps(secret.model_dump(mode="json"))]
    assert [("hush-hush" in text, "*****" in text) for text in shown] == [(False, True)] * 3


def test_a_shown_configuration_can_be_used_again(tmp_path: Path) -> None:
    command = {**OAUTH, "sasl_oauth_token_command": ["get-token", "--for", "kafka"]}
    file = tmp_path / "sluice.toml"
    file.write_text(render_toml(settings(**command)), encoding="utf-8")
    assert load(file).kafka == section(**command)


def test_plain_text_needs_nothing() -> None:
    connection = Connection(section(bootstrap_servers="a:1"))
    assert connection.aiokafka() == {"bootstrap_servers": "a:1", "security_protocol": "PLAINTEXT"}
    assert connection.librdkafka() == {"bootstrap.servers": "a:1", "security.protocol": "PLAINTEXT", "log_level": 0}


def test_both_client_libraries_get_the_same_credentials() -> None:
    connection = Connection(section(**SCRAM), "b:2")
    arguments = connection.aiokafka()
    assert isinstance(arguments.pop("ssl_context"), ssl.SSLContext)
    assert arguments == {
        "bootstrap_servers": "b:2",
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "sluice",
        "sasl_plain_password": "hush-hush",
    }
    assert connection.librdkafka() == {
        "bootstrap.servers": "b:2",
        "security.protocol": "SASL_SSL",
        "log_level": 0,
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "sluice",
        "sasl.password": "hush-hush",
    }


def test_a_rotated_password_file_is_read_for_the_next_client_and_a_vanished_one_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("first\n", encoding="utf-8")
    with_file = {**SCRAM, "sasl_password": "", "sasl_password_file": str(file)}
    connection = Connection(section(**with_file))
    file.write_text("second\n", encoding="utf-8")
    assert connection.aiokafka()["sasl_plain_password"] == "second"
    file.unlink()
    assert connection.aiokafka()["sasl_plain_password"] == "second"
    with pytest.raises(SetupError, match=r"kafka\.sasl_password_file .* cannot be read: No such file"):
        Connection(section(**with_file))


def test_brokers_are_checked_by_certificate_and_by_name(certificates: Certificates) -> None:
    context = Connection(section(security_protocol="SSL", ssl_ca=str(certificates.ca))).aiokafka()["ssl_context"]
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


def test_files_that_are_no_certificates_are_named(certificates: Certificates, tmp_path: Path) -> None:
    tls = {"security_protocol": "SSL", "ssl_ca": str(certificates.ca)}
    pair = {"ssl_certificate": str(certificates.client), "ssl_key": str(certificates.client_key)}
    empty = tmp_path / "empty.pem"
    empty.touch()
    for wrong, words in (
        ({"ssl_ca": "/nowhere"}, "kafka.ssl_ca /nowhere cannot be read"),
        ({"ssl_ca": str(empty)}, "kafka.ssl_ca .* holds no PEM certificates"),
        ({**pair, "ssl_key": "/nowhere"}, "kafka.ssl_key /nowhere cannot be read"),
        ({**pair, "ssl_key": str(certificates.broker_key)}, "kafka.ssl_certificate and kafka.ssl_key do not load together"),
    ):
        with pytest.raises(SetupError, match=words):
            Connection(section(**{**tls, **wrong}))


def test_a_token_file_is_read_each_time(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("one\n", encoding="utf-8")
    source = TokenSource(file=str(file))
    assert source.read() == "one"
    file.write_text("two", encoding="utf-8")
    assert source.read() == "two"


async def test_a_token_command_is_asked_again_once_its_answer_is_old(tmp_path: Path) -> None:
    now = 0.0
    counter = tmp_path / "count"
    command = ("sh", "-c", f"echo x >> {counter}; wc -l < {counter} | tr -d ' '")
    source = TokenSource(command=command, refresh_s=60.0, clock=lambda: now, wall=lambda: 1_000.0)
    assert [source.read(), await source.token(), source.librdkafka("")] == ["1", "1", ("1", 1_060.0)]
    now = 61.0
    assert source.read() == "2"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("false",), "ended with exit status 1"),
        (("/nowhere/get-token",), "cannot be started: No such file"),
        (("echo", "two words"), "gives no token"),
        (("true",), "gives no token"),
    ],
)
def test_a_command_that_gives_no_token_is_named(command: tuple[str, ...], words: str) -> None:
    with pytest.raises(TokenUnavailableError, match=f"kafka.sasl_oauth_token_command {command[0]} {words}"):
        TokenSource(command=command).read()
