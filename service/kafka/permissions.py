"""What a replica must be allowed to do on the cluster, and whether it is: the broker itself is asked, by the credentials in use.

`needed` is the one list, least privilege; deploy/RUNBOOK.md shows it as commands, and a test on a broker with an authorizer holds that it
suffices and that nothing in it is spare. The broker tells what may be done with a topic or group to whoever may describe it
(KIP-430); it does not tell this of transactional ids.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient

from service.kafka.connection import Connection
from service.kafka.topics import Topics

_TIMEOUT_S = 5.0

Resource = Literal["topic", "group", "transactional-id"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Permission:
    """An operation in Kafka's words. Read and Write imply Describe. A transactional id's name is a prefix."""

    resource: Resource
    name: str
    operation: str
    reason: str


def needed(topics: Topics, group_id: str, *, chunks: bool = True) -> tuple[Permission, ...]:
    """What the service needs for exactly once; of class topics, each that is used needs what the prompts topic does.

    `chunks`: they are written.
    """
    wanted = [
        (topics.prompts, "Read", "takes prompts"),
        (topics.results, "Write", "writes results"),
        (topics.results, "Read", "knows which idempotency keys were answered"),
        (topics.dead_letters, "Write", "writes dead letters"),
        (topics.dead_letters, "Read", "tries at start what the broker's transactions are worth"),
        (topics.control, "Read", "hears cancels"),
    ]
    if chunks:
        wanted += [
            (topics.chunks, "Write", "writes tokens"),
            (topics.chunks, "Read", "continues what another replica began"),
        ]
    joins = Permission(resource="group", name=group_id, operation="Read", reason="joins the group, commits its progress")
    once = Permission(
        resource="transactional-id",
        name=f"{topics.prefix}{group_id}.",
        operation="Write",
        reason="writes results and progress in one transaction",
    )
    return (*(Permission(resource="topic", name=name, operation=op, reason=why) for name, op, why in wanted), joins, once)


def lacking(
    connection: Connection, permissions: Iterable[Permission], more_prompts: Sequence[str] = ()
) -> tuple[tuple[str, str], ...]:
    """(resource, what to allow) for each of `permissions` that the broker says these credentials do not have.

    `more_prompts`: further topics that are read. Blocks for some seconds at most. What the broker does not tell (it is too old, a
    coordinator moves, a topic is missing) is not lacking. Raises `KafkaException` for credentials that no client can be made with.
    """
    wanted = {(one.resource, one.name, one.operation): one for one in permissions}
    for name in more_prompts:
        one = Permission(resource="topic", name=name, operation="Read", reason="takes prompts")
        wanted.setdefault(("topic", name, "Read"), one)
    admin = AdminClient(connection.librdkafka())
    # A token is asked for in a callback, which only `poll` runs.
    admin.poll(0)
    topics = sorted({one.name for one in wanted.values() if one.resource == "topic"})
    groups = sorted({one.name for one in wanted.values() if one.resource == "group"})
    options = {"include_authorized_operations": True, "request_timeout": _TIMEOUT_S}
    allowed = {
        "topic": _allowed(admin.describe_topics(TopicCollection(topics), **options)),
        "group": _allowed(admin.describe_consumer_groups(groups, **options)),
    }
    found = []
    for one in wanted.values():
        # Of transactional ids the broker tells nothing: `delivery.choose` finds out by using one.
        operations = allowed.get(one.resource, {}).get(one.name)
        if operations is not None and one.operation.upper() not in operations:
            what = f"these credentials may not {one.operation} this {one.resource}: Sluice {one.reason}"
            how = f"kafka-acls.sh --add --allow-principal User:... --operation {one.operation} --{one.resource} {one.name}"
            found.append((one.name, f"{what}; allow it: {how}"))
    return tuple(found)


def _allowed(answers: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """The names of the operations allowed on each resource; without those of which the broker says nothing."""
    found: dict[str, frozenset[str]] = {}
    denied = (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED)
    for name, answer in answers.items():
        try:
            operations = answer.result(_TIMEOUT_S).authorized_operations
        except KafkaException as error:
            if error.args[0].code() in denied:
                found[name] = frozenset()
        except TimeoutError:
            continue
        else:
            if operations:
                found[name] = frozenset(operation.name for operation in operations)
    return found
