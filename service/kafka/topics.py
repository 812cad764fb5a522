"""Topic names, their creation, and the check that they fit together.

`check` finds what would lose or misplace records: partition counts that differ, a wrong cleanup policy, a retention shorter than
the deadlines that prompts may carry. It reports; callers decide.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import IncompatibleBrokerVersion, TopicAlreadyExistsError, for_code

from service.kafka.budget import QueueClass

CLASSES: tuple[QueueClass, ...] = ("interactive", "standard", "batch")
WEIGHTS: dict[QueueClass, int] = {"interactive": 8, "standard": 4, "batch": 1}
"""Turns that a class's partitions get in one rotation of the poll loop."""
_HOUR_MS = 3_600_000
_REPLICAS = 3


@dataclass(frozen=True, slots=True)
class Topics:
    """The names under one prefix."""

    prefix: str

    @property
    def prompts(self) -> str:
        return f"{self.prefix}prompts"

    @property
    def results(self) -> str:
        return f"{self.prefix}results"

    @property
    def chunks(self) -> str:
        return f"{self.prefix}chunks"

    @property
    def dead_letters(self) -> str:
        return f"{self.prefix}dlq"

    @property
    def control(self) -> str:
        return f"{self.prefix}control"

    @property
    def classes(self) -> dict[str, QueueClass]:
        """Every topic that may hold prompts, with its class; `prompts` itself is standard. Those of a class are optional."""
        return {self.prompts: "standard", **{f"{self.prompts}.{name}": name for name in CLASSES}}

    @property
    def required(self) -> tuple[str, ...]:
        """The topics that must exist."""
        return (self.prompts, self.results, self.chunks, self.dead_letters, self.control)

    def policies(self) -> dict[str, dict[str, str]]:
        """Configuration of each required topic as `create` makes it; times in milliseconds."""
        return {
            self.prompts: {"cleanup.policy": "delete"},
            self.results: {"cleanup.policy": "compact,delete"},
            self.chunks: {"cleanup.policy": "delete", "retention.ms": str(24 * _HOUR_MS)},
            self.dead_letters: {"cleanup.policy": "delete", "retention.ms": str(28 * 24 * _HOUR_MS)},
            self.control: {"cleanup.policy": "delete", "retention.ms": str(24 * _HOUR_MS)},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that `check` saw. An `error` keeps the service from consuming; a `warning` can lose or delay records."""

    level: Literal["error", "warning"]
    topic: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicReport:
    """What is there: partitions of each topic that exists, and the findings."""

    partitions: Mapping[str, int]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not any(finding.level == "error" for finding in self.findings)


async def create(
    admin: AIOKafkaAdminClient, topics: Topics, *, partitions: int, replication_factor: int = -1
) -> tuple[str, ...]:
    """Creates the required topics that are missing and names them. Raises `KafkaError` when the broker refuses one.

    `replication_factor` -1: three, or as many as there are brokers. (aiokafka cannot ask for the broker's own default.)
    """
    existing = set(await admin.list_topics())
    missing = [name for name in topics.required if name not in existing]
    if not missing:
        return ()
    if replication_factor < 1:
        replication_factor = min(_REPLICAS, len((await admin.describe_cluster())["brokers"]))
    policies = topics.policies()
    response = await admin.create_topics(
        [
            NewTopic(name, num_partitions=partitions, replication_factor=replication_factor, topic_configs=policies[name])
            for name in missing
        ]
    )
    for name, code, *rest in response.topic_errors:
        error = for_code(code)
        # Another replica may have been faster.
        if code != 0 and error is not TopicAlreadyExistsError:
            raise error(f"topic {name}: {rest[0] if rest else ''}")
    return tuple(missing)


async def describe(admin: AIOKafkaAdminClient, topics: Topics) -> dict[str, int]:
    """Partitions of each of our topics that exists."""
    existing = set(await admin.list_topics())
    wanted = [name for name in (*topics.required, *topics.classes) if name in existing]
    if not wanted:
        return {}
    found = await admin.describe_topics(sorted(set(wanted)))
    return {topic["topic"]: len(topic["partitions"]) for topic in found}


async def check(admin: AIOKafkaAdminClient, topics: Topics, *, longest_deadline_ms: int = 0) -> TopicReport:
    """Looks at what the broker has. `longest_deadline_ms` 0: not known, so retention is only compared with an hour."""
    partitions = await describe(admin, topics)
    unread: tuple[Finding, ...] = ()
    configs: dict[str, dict[str, str]] = {}
    try:
        configs = await _configs(admin, tuple(partitions))
    except IncompatibleBrokerVersion:
        message = "this broker does not tell its topics' configuration: cleanup and retention are not checked"
        unread = (Finding(level="warning", topic=topics.prompts, message=message),)
    findings = judge(topics, partitions, configs, longest_deadline_ms=longest_deadline_ms)
    return TopicReport(partitions=partitions, findings=(*findings, *unread))


def judge(
    topics: Topics,
    partitions: Mapping[str, int],
    configs: Mapping[str, Mapping[str, str]],
    *,
    longest_deadline_ms: int = 0,
) -> tuple[Finding, ...]:
    """The findings for topics with these partition counts and configurations; topics without a configuration are not judged by it."""
    findings = [
        Finding(level="error", topic=name, message="does not exist; `sluice topics create` makes it")
        for name in topics.required
        if name not in partitions
    ]
    own = {name: partitions[name] for name in (*topics.classes, topics.results, topics.chunks) if name in partitions}
    wanted = partitions.get(topics.prompts)
    findings += [
        Finding(
            level="error", topic=name, message=f"has {count} partitions where {topics.prompts} has {wanted}; they must be equal"
        )
        for name, count in own.items()
        if wanted is not None and count != wanted
    ]
    for name in partitions:
        if name in configs:
            findings += _judge_config(topics, name, configs[name], max(longest_deadline_ms, _HOUR_MS))
    return tuple(findings)


def _judge_config(topics: Topics, name: str, config: Mapping[str, str], needed_ms: int) -> list[Finding]:
    findings = []
    policy = {word.strip() for word in config.get("cleanup.policy", "delete").split(",")}
    if name != topics.results and "compact" in policy:
        # Compaction keeps one record a key: of prompts that share a conversation, or of a request's chunks, all but the last go.
        findings.append(
            Finding(level="error", topic=name, message="is compacted, which drops records; set cleanup.policy=delete")
        )
    retention = config.get("retention.ms", "-1")
    if name in topics.classes and "delete" in policy and retention.isdigit() and int(retention) < needed_ms:
        findings.append(
            Finding(
                level="warning",
                topic=name,
                message=f"keeps records for {retention} ms; prompts may wait for {needed_ms} ms and would be lost unread",
            )
        )
    return findings


async def _configs(admin: AIOKafkaAdminClient, names: tuple[str, ...]) -> dict[str, dict[str, str]]:
    if not names:
        return {}
    asked = [ConfigResource(ConfigResourceType.TOPIC, name, {"cleanup.policy": None, "retention.ms": None}) for name in names]
    configs: dict[str, dict[str, str]] = {}
    for response in await admin.describe_configs(asked):
        for resource in response.resources:
            code, name, entries = resource[0], resource[3], resource[4]
            if code == 0:
                configs[name] = {entry[0]: entry[1] for entry in entries}
    return configs
