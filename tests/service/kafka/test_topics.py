"""Turns of the poll loop by class, and where a class's prompts go."""

import pytest

from service.errors import RequestError
from service.kafka.records import TopicPartition
from service.kafka.topics import WEIGHTS, Topics, to_write, turns

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


@pytest.mark.parametrize(
    ("queue_class", "existing", "topic"),
    [
        ("", {"t.prompts"}, "t.prompts"),
        ("batch", {"t.prompts", "t.prompts.batch"}, "t.prompts.batch"),
        ("standard", {"t.prompts"}, "t.prompts"),
        ("standard", {"t.prompts", "t.prompts.standard"}, "t.prompts.standard"),
    ],
)
async def test_a_prompt_goes_to_its_class(queue_class: str, existing: set[str], topic: str) -> None:
    async def exists(name: str) -> bool:
        return name in existing

    assert await to_write(Topics("t."), queue_class, exists) == topic


@pytest.mark.parametrize(
    ("queue_class", "words"), [("urgent", "one of interactive, standard, batch"), ("batch", "topics create --class batch")]
)
async def test_a_class_that_is_not_there_is_refused_with_what_to_do(queue_class: str, words: str) -> None:
    async def exists(name: str) -> bool:
        return name == "t.prompts"

    with pytest.raises(RequestError, match=words) as caught:
        await to_write(Topics("t."), queue_class, exists)
    assert (caught.value.code, caught.value.field) == ("invalid_field", "queue_class")
