"""Turns of the poll loop by class."""

from service.kafka.records import TopicPartition
from service.kafka.topics import WEIGHTS, turns

INTERACTIVE, STANDARD, BATCH = (TopicPartition(f"t.prompts.{name}", 0) for name in WEIGHTS)


def test_a_class_gets_turns_by_its_weight() -> None:
    rotation = turns({BATCH: 1, INTERACTIVE: 8, STANDARD: 4})
    assert [rotation.count(partition) for partition in (INTERACTIVE, STANDARD, BATCH)] == [8, 4, 1]
    assert rotation[:3] == [BATCH, INTERACTIVE, STANDARD]


def test_every_partition_of_a_class_gets_the_same() -> None:
    other = TopicPartition("t.prompts.interactive", 1)
    assert turns({INTERACTIVE: 8, other: 8}) == [INTERACTIVE, other]
    assert turns({INTERACTIVE: 8, other: 8, STANDARD: 4}).count(other) == 2


def test_nothing_to_read_is_no_turn() -> None:
    assert turns({}) == []
