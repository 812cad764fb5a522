"""Topics of prompts that come, go and are made anew, as two looks in a row have seen them."""

from collections.abc import Mapping

import pytest

from service.errors import SetupError
from service.kafka.prompt_topics import PromptTopics
from service.kafka.topic_look import TopicLook
from service.kafka.topics import Topics

TOPICS = Topics("t.")
PROMPTS, BATCH = "t.prompts", "t.prompts.batch"

Seen = Mapping[str, TopicLook]


def look(topic_id: str, *, num_partitions: int = 2, led: bool = True) -> TopicLook:
    return TopicLook(topic_id=topic_id, num_partitions=num_partitions, led=led)


def seen(topics: PromptTopics, *looks: Seen) -> list[Mapping[str, str] | None]:
    return [topics.changed(one) for one in looks]


ALONE: Seen = {PROMPTS: look("p1")}
WITH_BATCH: Seen = {PROMPTS: look("p1"), BATCH: look("b1")}
BATCH_ANEW: Seen = {PROMPTS: look("p1"), BATCH: look("b2")}


def test_a_topic_that_came_is_read_after_the_second_look_and_told_once() -> None:
    topics = PromptTopics(TOPICS, {PROMPTS: "p1"})
    assert seen(topics, ALONE, WITH_BATCH, WITH_BATCH, WITH_BATCH) == [None, None, {PROMPTS: "p1", BATCH: "b1"}, None]


def test_a_topic_waits_for_its_leaders() -> None:
    young = {**ALONE, BATCH: look("b1", led=False)}
    topics = PromptTopics(TOPICS, {PROMPTS: "p1"})
    assert seen(topics, young, young, WITH_BATCH, WITH_BATCH) == [None, None, None, {PROMPTS: "p1", BATCH: "b1"}]


def test_a_topic_with_another_number_of_partitions_is_not_read() -> None:
    small = {**ALONE, BATCH: look("b1", num_partitions=1)}
    assert seen(PromptTopics(TOPICS, {PROMPTS: "p1"}), small, small) == [None, None]


def test_a_topic_that_is_read_stays_while_its_leaders_are_away() -> None:
    away = {PROMPTS: look("p1", led=False), BATCH: look("b1", led=False)}
    assert seen(PromptTopics(TOPICS, {PROMPTS: "p1", BATCH: "b1"}), WITH_BATCH, away, away) == [None, None, None]


def test_a_topic_that_went_is_read_no_longer_after_the_second_look() -> None:
    assert seen(PromptTopics(TOPICS, {PROMPTS: "p1", BATCH: "b1"}), ALONE, ALONE, ALONE) == [None, {PROMPTS: "p1"}, None]


def test_a_topic_that_was_made_anew_is_another() -> None:
    topics = PromptTopics(TOPICS, {PROMPTS: "p1", BATCH: "b1"})
    assert seen(topics, BATCH_ANEW, BATCH_ANEW, BATCH_ANEW) == [None, {PROMPTS: "p1", BATCH: "b2"}, None]


def test_one_made_anew_that_does_not_fit_is_read_no_longer() -> None:
    small = {**ALONE, BATCH: look("b2", num_partitions=1)}
    assert seen(PromptTopics(TOPICS, {PROMPTS: "p1", BATCH: "b1"}), small, small) == [None, {PROMPTS: "p1"}]


def test_identities_that_were_not_known_change_nothing() -> None:
    topics = PromptTopics(TOPICS, {PROMPTS: "", BATCH: ""})
    nameless = {PROMPTS: look(""), BATCH: look("")}
    assert seen(topics, WITH_BATCH, WITH_BATCH, nameless, nameless) == [None, None, None, None]
    assert seen(topics, BATCH_ANEW, BATCH_ANEW) == [None, {PROMPTS: "p1", BATCH: "b2"}]


def test_one_made_anew_before_the_first_look_is_another_than_what_is_held() -> None:
    topics, held = PromptTopics(TOPICS, {PROMPTS: "", BATCH: ""}), [(PROMPTS, "p1"), (BATCH, "b1")]
    assert [topics.changed(BATCH_ANEW, held) for _ in range(2)] == [None, {PROMPTS: "p1", BATCH: "b2"}]
    assert topics.changed(BATCH_ANEW, [(PROMPTS, "p1"), (BATCH, "b2"), (BATCH, "")]) is None


def test_without_the_main_topic_the_connection_ends() -> None:
    topics = PromptTopics(TOPICS, {PROMPTS: "p1"})
    assert seen(topics, {}) == [None]
    with pytest.raises(SetupError, match=r"t\.prompts does not exist any more"):
        seen(topics, {})
