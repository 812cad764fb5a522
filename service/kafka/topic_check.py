"""Compares a cluster with what Sluice needs, and says what would lose, misplace or refuse records, and what to set.

An `error` keeps the service from consuming; a `warning` can lose or delay records. It reports; callers decide. Settings that the
broker does not tell (it is too old, or an ACL hides them) are themselves a finding, never taken for "in order".
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import IncompatibleBrokerVersion
from confluent_kafka import KafkaException

from service.config import KafkaSection
from service.kafka.connection import Connection
from service.kafka.output import REQUEST_OVERHEAD_BYTES
from service.kafka.permissions import lacking, needed
from service.kafka.topics import Topics

_HOUR_MS = 3_600_000
_SETTINGS = (
    "cleanup.policy",
    "retention.ms",
    "retention.bytes",
    "min.insync.replicas",
    "max.message.bytes",
    "unclean.leader.election.enable",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was seen. `topic`: what it is about, which may be the group."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the broker tells: of each topic its partitions, and its smallest number of copies; how many brokers; the settings."""

    partitions: Mapping[str, int]
    copies: Mapping[str, int]
    num_brokers: int
    configs: Mapping[str, Mapping[str, str]]


async def check(
    admin: AIOKafkaAdminClient, connection: Connection, section: KafkaSection, *, longest_deadline_ms: int = 0
) -> TopicReport:
    """Looks at what the broker has. `longest_deadline_ms` 0: not known, so retention is compared with an hour."""
    topics = Topics(section.topic_prefix)
    seen = await look(admin, topics)
    findings = list(judge(topics, seen, longest_deadline_ms=longest_deadline_ms, max_result_bytes=section.max_result_bytes))
    if not section.embedded:
        findings = _with_permissions(findings, await _denied(connection, section, topics, seen))
    return TopicReport(partitions=seen.partitions, findings=tuple(findings))


async def look(admin: AIOKafkaAdminClient, topics: Topics) -> Seen:
    """Asks the broker."""
    brokers = (await admin.describe_cluster())["brokers"]
    existing = set(await admin.list_topics())
    wanted = sorted({name for name in (*topics.required, *topics.classes) if name in existing})
    described = await admin.describe_topics(wanted) if wanted else []
    return Seen(
        partitions={topic["topic"]: len(topic["partitions"]) for topic in described},
        copies={topic["topic"]: min((len(p["replicas"]) for p in topic["partitions"]), default=0) for topic in described},
        num_brokers=len(brokers),
        configs=await _configs(admin, tuple(wanted)),
    )


def judge(
    topics: Topics, seen: Seen, *, longest_deadline_ms: int = 0, max_result_bytes: int = 1_000_000
) -> tuple[Finding, ...]:
    """The findings for what was seen."""
    partitions = seen.partitions
    findings = [
        _error(name, "does not exist; `sluice topics create` makes it") for name in topics.required if name not in partitions
    ]
    wanted = partitions.get(topics.prompts)
    for name in (*topics.classes, topics.results, topics.chunks):
        if wanted is not None and partitions.get(name, wanted) != wanted:
            counts = f"has {partitions[name]} partitions where {topics.prompts} has {wanted}"
            findings.append(_error(name, f"{counts}; they must be equal"))
    needed_ms = max(longest_deadline_ms, _HOUR_MS)
    for name in partitions:
        if name in seen.configs:
            config = seen.configs[name]
            findings += _judge_cleanup(topics, name, config, needed_ms)
            findings += _judge_copies(topics, name, config, seen.copies.get(name, 1), seen.num_brokers)
            largest = int(config.get("max.message.bytes", max_result_bytes + REQUEST_OVERHEAD_BYTES))
            if name in (topics.results, topics.dead_letters) and largest < max_result_bytes:
                findings.append(
                    _warning(name, f"takes {largest} bytes a record (max.message.bytes), less than kafka.max_result_bytes")
                )
    if hidden := sorted(name for name in partitions if name not in seen.configs):
        message = "the broker does not tell its settings (too old, or DescribeConfigs is not allowed): they are not checked"
        findings.append(_warning(", ".join(hidden), message))
    return tuple(findings)


def _judge_cleanup(topics: Topics, name: str, config: Mapping[str, str], needed_ms: int) -> list[Finding]:
    policy = {word.strip() for word in config.get("cleanup.policy", "delete").split(",")}
    if name != topics.results and "compact" in policy:
        # Compaction keeps one record a key: of prompts that share a conversation, or of a request's chunks, all but the last go.
        return [_error(name, "is compacted, which drops records; set cleanup.policy=delete")]
    findings = []
    if name == topics.results and "compact" not in policy:
        message = "is not compacted: a result that came twice stays twice; set cleanup.policy=compact,delete"
        findings.append(_warning(name, message))
    retention = config.get("retention.ms", "-1")
    if "delete" in policy and retention.isdigit() and int(retention) < needed_ms:
        lost = {topics.chunks: "a generation could not be resumed", topics.control: "a cancel would be lost"}
        if name in (*topics.classes, *lost):
            outcome = lost.get(name, "they would be lost unread")
            message = f"keeps records for {retention} ms (retention.ms); prompts may wait for {needed_ms} ms: {outcome}"
            findings.append(_warning(name, message))
    if name in topics.classes and "delete" in policy and config.get("retention.bytes", "-1").isdigit():
        message = f"keeps {config['retention.bytes']} bytes a partition (retention.bytes): a backlog above it is lost unread"
        findings.append(_warning(name, message))
    return findings


def _judge_copies(topics: Topics, name: str, config: Mapping[str, str], copies: int, num_brokers: int) -> list[Finding]:
    in_sync = int(config.get("min.insync.replicas", "1"))
    if in_sync > copies:
        message = f"has {copies} copies and wants {in_sync} in sync (min.insync.replicas): nothing can be written to it"
        return [_error(name, message)]
    findings = []
    if config.get("unclean.leader.election.enable") == "true":
        findings.append(_warning(name, "may lose acknowledged records; set unclean.leader.election.enable=false"))
    if num_brokers == 1:
        # Nothing else is possible there, and everyone knows it.
        return findings
    if copies == 1:
        findings.append(_warning(name, "has one copy: it is gone, or away, with its broker; make it with 3"))
    elif in_sync == 1:
        findings.append(_warning(name, "may acknowledge what one broker alone holds; set min.insync.replicas=2"))
    elif in_sync == copies:
        message = f"stops when one broker does: {copies} copies, all wanted in sync (min.insync.replicas); have one copy more"
        findings.append(_warning(name, message))
    return findings


async def _denied(connection: Connection, section: KafkaSection, topics: Topics, seen: Seen) -> tuple[tuple[str, str], ...]:
    permissions = needed(topics, section.group_id, chunks=section.chunks_enabled)
    extra = tuple(name for name in topics.classes if name in seen.partitions)
    try:
        return await asyncio.to_thread(lacking, connection, permissions, extra)
    except KafkaException as error:
        reason = error.args[0].str() if error.args else type(error).__name__
        return (("", f"the broker does not tell what these credentials may do ({reason})"),)


def _with_permissions(findings: list[Finding], denied: tuple[tuple[str, str], ...]) -> list[Finding]:
    # A topic that may not even be described looks as if it did not exist.
    hidden = {name for name, _ in denied if name}
    kept = [finding for finding in findings if not (finding.topic in hidden and finding.message.startswith("does not exist"))]
    return kept + [_error(name, message) if name else _warning("permissions:", message) for name, message in denied]


def _error(topic: str, message: str) -> Finding:
    return Finding(level="error", topic=topic, message=message)


def _warning(topic: str, message: str) -> Finding:
    return Finding(level="warning", topic=topic, message=message)


async def _configs(admin: AIOKafkaAdminClient, names: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """The settings of each topic whose settings the broker tells."""
    if not names:
        return {}
    asked = [ConfigResource(ConfigResourceType.TOPIC, name, dict.fromkeys(_SETTINGS)) for name in names]
    configs: dict[str, dict[str, str]] = {}
    try:
        answers = await admin.describe_configs(asked)
    except IncompatibleBrokerVersion:
        return {}
    for answer in answers:
        for resource in answer.resources:
            code, name, entries = resource[0], resource[3], resource[4]
            if code == 0:
                configs[name] = {entry[0]: entry[1] for entry in entries}
    return configs
