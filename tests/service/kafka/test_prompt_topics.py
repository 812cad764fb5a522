"""Topics of prompts that come and go, as two looks in a row have seen them."""

from typing import Any

import pytest

from service.errors import SetupError
from service.kafka.prompt_topics import PromptTopics
from service.kafka.topics import Topics

TOPICS = Topics("t.")
PROMPTS, BATCH = "t.prompts", "t.prompts.batch"


class FakeAdmin:
    """Tells of topics by their partitions' leaders."""

    def __init__(self, **leaders: list[int]) -> None:
        self.leaders = {PROMPTS: [0, 0], **leaders}

    async def describe_topics(self) -> list[dict[str, Any]]:
        return [
            {"topic": name, "error_code": 0, "partitions": [{"leader": leader} for leader in leaders]}
            for name, leaders in self.leaders.items()
        ]


async def seen(topics: PromptTopics, *admins: FakeAdmin) -> list[frozenset[str] | None]:
    return [await topics.changed(admin) for admin in admins]


async def test_a_topic_that_came_is_read_after_the_second_look_and_told_once() -> None:
    with_batch = FakeAdmin(**{BATCH: [0, 0]})
    assert await seen(PromptTopics(TOPICS, frozenset({PROMPTS})), FakeAdmin(), with_batch, with_batch, with_batch) == [
        None,
        None,
        {PROMPTS, BATCH},
        None,
    ]


async def test_a_topic_waits_for_its_leaders() -> None:
    young, led = FakeAdmin(**{BATCH: [0, -1]}), FakeAdmin(**{BATCH: [0, 1]})
    assert await seen(PromptTopics(TOPICS, frozenset({PROMPTS})), young, young, led, led) == [
        None,
        None,
        None,
        {PROMPTS, BATCH},
    ]


async def test_a_topic_with_another_number_of_partitions_is_not_read() -> None:
    small = FakeAdmin(**{BATCH: [0]})
    assert await seen(PromptTopics(TOPICS, frozenset({PROMPTS})), small, small) == [None, None]


async def test_a_topic_that_is_read_stays_while_its_leaders_are_away() -> None:
    led, away = FakeAdmin(**{BATCH: [0, 0]}), FakeAdmin(**{BATCH: [-1, -1]})
    assert await seen(PromptTopics(TOPICS, frozenset({PROMPTS, BATCH})), led, away, away) == [None, None, None]


async def test_a_topic_that_went_is_read_no_longer_after_the_second_look() -> None:
    topics = PromptTopics(TOPICS, frozenset({PROMPTS, BATCH}))
    assert await seen(topics, FakeAdmin(), FakeAdmin(), FakeAdmin()) == [None, {PROMPTS}, None]


async def test_without_the_main_topic_the_connection_ends() -> None:
    topics, none = PromptTopics(TOPICS, frozenset({PROMPTS})), FakeAdmin()
    none.leaders = {}
    assert await seen(topics, none) == [None]
    with pytest.raises(SetupError, match=r"t\.prompts does not exist any more"):
        await seen(topics, none)
