"""What the topic check finds."""

from service.kafka.topics import Finding, Topics, judge

TOPICS = Topics("s.")
EVEN = dict.fromkeys(TOPICS.required, 6)


def test_topics_as_they_are_created_have_no_findings() -> None:
    assert judge(TOPICS, EVEN, TOPICS.policies()) == ()


def test_a_missing_topic_is_an_error_with_its_remedy() -> None:
    found = judge(TOPICS, {name: 6 for name in TOPICS.required if name != TOPICS.chunks}, {})
    assert found == (Finding(level="error", topic="s.chunks", message="does not exist; `sluice topics create` makes it"),)


def test_partition_counts_that_differ_are_an_error() -> None:
    (finding,) = judge(TOPICS, {**EVEN, TOPICS.results: 3}, {})
    assert (finding.level, finding.topic) == ("error", "s.results")
    assert "3 partitions where s.prompts has 6" in finding.message


def test_a_class_topic_counts_only_when_it_exists() -> None:
    assert judge(TOPICS, {**EVEN, "s.prompts.batch": 6}, {}) == ()
    assert [finding.topic for finding in judge(TOPICS, {**EVEN, "s.prompts.batch": 1}, {})] == ["s.prompts.batch"]


def test_a_compacted_prompt_topic_is_an_error() -> None:
    (finding,) = judge(TOPICS, EVEN, {TOPICS.prompts: {"cleanup.policy": "compact,delete", "retention.ms": "-1"}})
    assert (finding.level, finding.topic) == ("error", "s.prompts")


def test_retention_shorter_than_the_longest_deadline_is_a_warning() -> None:
    config = {TOPICS.prompts: {"cleanup.policy": "delete", "retention.ms": "7200000"}}
    assert judge(TOPICS, EVEN, config, longest_deadline_ms=7_200_000) == ()
    (finding,) = judge(TOPICS, EVEN, config, longest_deadline_ms=7_200_001)
    assert (finding.level, finding.topic) == ("warning", "s.prompts")
