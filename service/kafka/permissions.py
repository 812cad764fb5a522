"""What a replica must be allowed to do on the cluster, and whether it is: the broker itself is asked, by the credentials in use.

`needed` is the one list, least privilege; deploy/RUNBOOK.md shows it as commands, and a test on a broker with an authorizer holds that it
suffices and that nothing in it is spare. The broker tells what may be done with a topic or group to whoever may describe it
(KIP-430); it does not tell this of transactional ids.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient

from service.kafka.connection import Connection
from service.kafka.topics import Finding, Topics

_TIMEOUT_S = 10.0

Resource = Literal["topic", "group"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Permission:
    """An operation in Kafka's words. Read and Write imply Describe."""

    resource: Resource
    name: str
    operation: str
    reason: str


def needed(topics: Topics, group_id: str, *, chunks: bool = True) -> tuple[Permission, ...]:
    """What the service needs; of class topics, each that is used needs what the prompts topic does. `chunks`: they are written."""
    return (
        Permission(resource="topic", name=topics.prompts, operation="Read", reason="takes prompts"),
        Permission(resource="topic", name=topics.results, operation="Write", reason="writes results"),
        *([Permission(resource="topic", name=topics.chunks, operation="Write", reason="writes tokens")] if chunks else ()),
        Permission(resource="topic", name=topics.dead_letters, operation="Write", reason="writes dead letters"),
        Permission(resource="group", name=group_id, operation="Read", reason="joins the group and commits its progress"),
    )


def lacking(connection: Connection, permissions: Iterable[Permission]) -> tuple[Finding, ...]:
    """An error for each of `permissions` that the broker says these credentials do not have. Blocks for some seconds at most.

    What the broker does not tell (it is too old, a coordinator moves, a topic is missing) is no finding. Raises `KafkaException`
    when it does not answer at all.
    """
    wanted = tuple(permissions)
    admin = AdminClient(connection.librdkafka())
    # A token is asked for in a callback, which only `poll` runs.
    admin.poll(0)
    topics = sorted({one.name for one in wanted if one.resource == "topic"})
    groups = sorted({one.name for one in wanted if one.resource == "group"})
    allowed = {
        "topic": _allowed(
            admin.describe_topics(TopicCollection(topics), include_authorized_operations=True, request_timeout=_TIMEOUT_S)
        ),
        "group": _allowed(
            admin.describe_consumer_groups(groups, include_authorized_operations=True, request_timeout=_TIMEOUT_S)
        ),
    }
    findings = []
    for one in wanted:
        operations = allowed[one.resource].get(one.name)
        if operations is not None and one.operation.upper() not in operations:
            what = f"these credentials may not {one.operation} this {one.resource}, which {one.reason}"
            how = f"kafka-acls.sh --add --allow-principal User:... --operation {one.operation} --{one.resource} {one.name}"
            findings.append(Finding(level="error", topic=one.name, message=f"{what}; allow it: {how}"))
    return tuple(findings)


def _allowed(answers: dict) -> dict[str, frozenset[str]]:
    """The names of the operations allowed on each resource; without those of which the broker says nothing."""
    found: dict[str, frozenset[str]] = {}
    denied = (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED)
    for name, answer in answers.items():
        try:
            operations = answer.result(_TIMEOUT_S).authorized_operations
        except KafkaException as error:
            if error.args[0].code() in denied:
                found[name] = frozenset()
            elif error.args[0].code() in (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT):
                raise
        else:
            if operations:
                found[name] = frozenset(operation.name for operation in operations)
    return found
