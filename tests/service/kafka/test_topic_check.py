"""What the comparison of a cluster with Sluice's needs finds."""

from collections.abc import Mapping
from typing import Any

import pytest

from service.kafka.topic_check import Finding, Seen, judge
from service.kafka.topics import Topics

TOPICS = Topics("s.")
EVEN = dict.fromkeys(TOPICS.required, 6)
COPIES = dict.fromkeys(TOPICS.required, 3)
CONFIGS = {name: {**policy, "min.insync.replicas": "2"} for name, policy in TOPICS.policies().items()}


def seen(**changes: Any) -> Seen:
    return Seen(**{"partitions": EVEN, "copies": COPIES, "num_brokers": 3, "configs": CONFIGS, **changes})


def with_config(topic: str, **settings: str) -> Mapping[str, Mapping[str, str]]:
    """The usual settings, but for these of one topic; underscores stand for dots."""
    return {**CONFIGS, topic: {**CONFIGS[topic], **{name.replace("_", "."): value for name, value in settings.items()}}}


def test_topics_as_they_are_created_have_no_findings() -> None:
    assert judge(TOPICS, seen()) == ()


def test_a_missing_topic_is_an_error_with_its_remedy() -> None:
    found = judge(TOPICS, seen(partitions={name: 6 for name in TOPICS.required if name != TOPICS.chunks}))
    assert found == (Finding(level="error", topic="s.chunks", message="does not exist; `sluice topics create` makes it"),)


def test_partition_counts_that_differ_are_an_error() -> None:
    (finding,) = judge(TOPICS, seen(partitions={**EVEN, TOPICS.results: 3}))
    assert (finding.level, finding.topic) == ("error", "s.results")
    assert "3 partitions where s.prompts has 6" in finding.message


def test_a_class_topic_counts_only_when_it_exists() -> None:
    config = {**CONFIGS, "s.prompts.batch": CONFIGS[TOPICS.prompts]}
    copies = {**COPIES, "s.prompts.batch": 3}
    assert judge(TOPICS, seen(partitions={**EVEN, "s.prompts.batch": 6}, configs=config, copies=copies)) == ()
    found = judge(TOPICS, seen(partitions={**EVEN, "s.prompts.batch": 1}, configs=config, copies=copies))
    assert [finding.topic for finding in found] == ["s.prompts.batch"]


@pytest.mark.parametrize(
    ("topic", "settings", "level", "words"),
    [
        ("s.prompts", {"cleanup_policy": "compact,delete"}, "error", "is compacted, which drops records"),
        ("s.results", {"cleanup_policy": "delete"}, "warning", "is not compacted"),
        ("s.prompts", {"retention_ms": "7200000"}, "warning", "they would be lost unread"),
        ("s.chunks", {"retention_ms": "7200000"}, "warning", "could not be resumed"),
        ("s.control", {"retention_ms": "7200000"}, "warning", "a cancel would be lost"),
        ("s.prompts", {"retention_bytes": "1000"}, "warning", "a backlog above it is lost unread"),
        ("s.chunks", {"min_insync_replicas": "4"}, "error", "nothing can be written to it"),
        ("s.chunks", {"min_insync_replicas": "3"}, "warning", "stops when one broker does"),
        ("s.results", {"min_insync_replicas": "1"}, "warning", "set min.insync.replicas=2"),
        ("s.results", {"unclean_leader_election_enable": "true"}, "warning", "may lose acknowledged records"),
        ("s.results", {"max_message_bytes": "5000"}, "warning", "less than kafka.max_result_bytes"),
    ],
)  # fmt: skip
def test_a_setting_that_would_lose_or_stop_records_is_found(
    topic: str, settings: dict[str, str], level: str, words: str
) -> None:
    changed = {name.replace("unclean_leader", "unclean.leader"): value for name, value in settings.items()}
    (finding,) = judge(TOPICS, seen(configs=with_config(topic, **changed)), longest_deadline_ms=7_200_001)
    assert (finding.topic, finding.level) == (topic, level)
    assert words in finding.message


def test_retention_as_long_as_the_longest_deadline_is_enough() -> None:
    assert judge(TOPICS, seen(configs=with_config("s.prompts", retention_ms="7200000")), longest_deadline_ms=7_200_000) == ()


def test_one_copy_is_a_finding_only_where_there_are_more_brokers() -> None:
    single = {name: {**config, "min.insync.replicas": "1"} for name, config in CONFIGS.items()}
    one_copy = dict.fromkeys(TOPICS.required, 1)
    assert judge(TOPICS, seen(copies=one_copy, configs=single, num_brokers=1)) == ()
    found = judge(TOPICS, seen(copies=one_copy, configs=single))
    assert {finding.message for finding in found} == {"has one copy: it is gone, or away, with its broker; make it with 3"}


def test_settings_that_the_broker_does_not_tell_are_not_taken_for_right() -> None:
    (finding,) = judge(TOPICS, seen(configs={}))
    assert (finding.level, "are not checked" in finding.message) == ("warning", True)
