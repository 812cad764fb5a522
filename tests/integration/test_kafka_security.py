"""A broker that lets nobody in without credentials: every way in works, what is refused is said, the documented rights are exact."""

import asyncio
import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from service.config import KafkaSection
from service.kafka.connection import Connection
from service.kafka.permissions import needed
from service.kafka.topics import Topics
from tests.integration.app_harness import flags, run
from tests.integration.kafka_harness import Broker, eventually, serving
from tests.servers import kafka, secure_kafka
from tests.servers.secure_kafka import PASSWORD, USER, SecureKafka
from tests.service.kafka.fakes import FakeGeneration

pytestmark = pytest.mark.kafka

RUNBOOK = Path(__file__).resolve().parents[2] / "deploy" / "RUNBOOK.md"
FAR_S = 4_000_000_000
Right = tuple[str, str, str]


@pytest.fixture(scope="module")
def server() -> Iterator[SecureKafka]:
    try:
        with secure_kafka.running() as server:
            yield server
    except kafka.ServerError as error:
        pytest.fail(str(error), pytrace=False)


def unsigned_token(subject: str) -> str:
    """A token that the test broker takes: RFC 7515 without a signature."""
    parts = ({"alg": "none"}, {"sub": subject, "iat": 1_700_000_000, "exp": FAR_S})
    return ".".join([*(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts), ""])


def password(server: SecureKafka, **changes: Any) -> dict[str, Any]:
    """Settings of a client that comes with a password, by SCRAM-SHA-512."""
    return {
        "bootstrap_servers": server.sasl_bootstrap,
        "security_protocol": "SASL_SSL",
        "ssl_ca": str(server.certificates.ca),
        "sasl_username": USER,
        "sasl_password": PASSWORD,
        **changes,
    }


def without_password(server: SecureKafka, **changes: Any) -> dict[str, Any]:
    return {
        name: value for name, value in password(server, **changes).items() if name not in ("sasl_username", "sasl_password")
    }


def certificate(server: SecureKafka) -> dict[str, Any]:
    """Settings of a client that comes with a certificate."""
    own = server.certificates
    return {
        "bootstrap_servers": server.tls_bootstrap,
        "security_protocol": "SSL",
        "ssl_ca": str(own.ca),
        "ssl_certificate": str(own.client),
        "ssl_key": str(own.client_key),
    }


def secured(broker: Broker, security: dict[str, Any]) -> KafkaSection:
    return KafkaSection(**{**broker.section().model_dump(), **security})


def documented(topics: Topics, group: str) -> set[Right]:
    """(operation, kind, name) of each command in the runbook, with these names in place of the default ones."""
    found = re.findall(
        r"^kafka-acls.sh --add .*--operation (\w+) +--(topic|group|transactional-id) (\S+)",
        RUNBOOK.read_text("utf-8"),
        re.MULTILINE,
    )
    default = Topics("sluice.")
    ours = {
        getattr(default, name): getattr(topics, name) for name in ("prompts", "results", "chunks", "dead_letters", "control")
    }
    ours |= {"sluice": group, "sluice.sluice.": f"{topics.prefix}{group}."}
    return {(operation, kind, ours[name]) for operation, kind, name in found}


def pattern(kind: str) -> ResourcePatternType:
    return ResourcePatternType.PREFIXED if kind == "transactional-id" else ResourcePatternType.LITERAL


def grant(server: SecureKafka, rights: set[Right]) -> None:
    admin = AdminClient({"bootstrap.servers": server.bootstrap})
    bindings = [
        AclBinding(
            ResourceType[kind.upper().replace("-", "_")], name, pattern(kind), f"User:{USER}", "*", AclOperation[operation.upper()],
            AclPermissionType.ALLOW,
        )
        for operation, kind, name in rights
    ]  # fmt: skip
    for future in admin.create_acls(bindings).values():
        future.result(30)


async def test_every_way_of_saying_who_one_is_works_in_both_client_libraries(server: SecureKafka, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(unsigned_token(USER), encoding="ascii")
    oauth = without_password(server, sasl_mechanism="OAUTHBEARER")
    file = tmp_path / "password"
    file.write_text(PASSWORD + "\n", encoding="utf-8")
    ways = {
        "SCRAM-SHA-512": password(server),
        "SCRAM-SHA-256": password(server, sasl_mechanism="SCRAM-SHA-256"),
        "PLAIN": password(server, sasl_mechanism="PLAIN"),
        "password file": {**without_password(server), "sasl_username": USER, "sasl_password_file": str(file)},
        "token file": {**oauth, "sasl_oauth_token_file": str(token)},
        "token command": {**oauth, "sasl_oauth_token_command": ("cat", str(token))},
        "certificate": certificate(server),
    }
    for name, security in ways.items():
        connection = Connection(KafkaSection(**security))
        assert (name, await connection.explain()) == (name, "")
        admin = AdminClient(connection.librdkafka())
        admin.poll(0)
        cluster = await asyncio.to_thread(admin.list_topics, timeout=20)
        assert (name, len(cluster.brokers)) == (name, 1)


async def test_what_is_refused_is_said_with_the_setting_to_look_at(server: SecureKafka) -> None:
    tls = {"bootstrap_servers": server.tls_bootstrap, "security_protocol": "SSL", "ssl_ca": str(server.certificates.ca)}
    bad_token = without_password(server, sasl_mechanism="OAUTHBEARER", sasl_oauth_token_command=("echo", "nonsense"))
    refused = {
        "refused kafka.sasl_username sluice or its password": password(server, sasl_password="wrong"),
        "refused the token": bad_token,
        "shows a certificate that kafka.ssl_ca does not vouch for": password(server, ssl_ca=""),
        "or a client certificate (kafka.ssl_certificate)": tls,
        "another kafka.security_protocol than PLAINTEXT": {"bootstrap_servers": server.sasl_bootstrap},
        "cannot be reached (Connection refused)": {"bootstrap_servers": "127.0.0.1:1"},
    }
    for words, security in refused.items():
        said = await Connection(KafkaSection(**security)).explain()
        assert words in said
        assert PASSWORD not in said


async def test_a_command_says_what_is_refused_and_never_the_password(server: SecureKafka, tmp_path: Path) -> None:
    wrong = {name: value for name, value in password(server, sasl_password="hush-hush").items() if name != "bootstrap_servers"}
    code, out, errors = await run("topics", "check", "--brokers", server.sasl_bootstrap, *flags({"kafka": wrong}))
    assert (code, out) == (3, "")
    assert "refused kafka.sasl_username sluice or its password" in errors
    assert "hush-hush" not in errors


@pytest.mark.parametrize("way", [password, certificate])
async def test_the_documented_rights_suffice(server: SecureKafka, way: Any, caplog: pytest.LogCaptureFixture) -> None:
    broker = Broker(server.bootstrap)
    grant(server, documented(broker.topics, broker.section().group_id))
    section = secured(broker, way(server))
    async with serving(section, FakeGeneration()):
        await broker.say("hello")
        await broker.publish(b"not JSON")
        results = await broker.results(2)
        await broker.read(broker.topics.dead_letters, count=1)
        await broker.read(broker.topics.chunks, count=2)
    assert sorted(result["status"] for result in results) == ["failed", "finished"]
    assert PASSWORD not in caplog.text


async def test_with_one_right_fewer_it_serves_nothing_and_says_which(server: SecureKafka) -> None:
    async def reason(missing: str, fewer: set[Right], broker: Broker) -> None:
        async with serving(secured(broker, password(server)), FakeGeneration(), wait=False) as transport:
            await eventually(lambda: transport.status().state == "unreachable")
            assert missing in transport.status().reason

    async with asyncio.TaskGroup() as together:
        for index in range(len(documented(Topics("x."), "x"))):
            broker = Broker(server.bootstrap, partitions=1)
            rights = sorted(documented(broker.topics, broker.section().group_id))
            operation, kind, name = rights.pop(index)
            grant(server, set(rights))
            missing = f"these credentials may not {operation} this {kind}"
            if kind == "transactional-id":
                missing = f"these credentials may not use the transactional ids {name}*"
            together.create_task(reason(missing, set(rights), broker), name=name)


def test_the_documented_rights_are_those_that_are_checked() -> None:
    topics = Topics("a.")
    wanted = {(one.operation, one.resource, one.name) for one in needed(topics, "g")}
    assert documented(topics, "g") == wanted
