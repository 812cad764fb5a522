"""Which topics of prompts a cluster has, looked at again and again: one of a class may come or go while replicas run.

Guarantee: a topic counts as come only once each of its partitions has a leader and there are as many as `prompts` has; nothing counts
as changed before two looks in a row have found the same.
"""

from typing import Any

import structlog
from aiokafka.admin import AIOKafkaAdminClient

from service.errors import SetupError
from service.kafka.topics import Topics

_log = structlog.get_logger(__name__)


class PromptTopics:
    """What is read now, and what the last look found."""

    def __init__(self, topics: Topics, read: frozenset[str]) -> None:
        self._topics = topics
        self._read = self._found = read
        self._told: frozenset[str] = frozenset()

    async def changed(self, admin: AIOKafkaAdminClient) -> frozenset[str] | None:
        """The topics to read from now on, when they are others than until now; looks once.

        Raises `KafkaError`; `SetupError` when `prompts` itself is gone.
        """
        # All topics, never these by name: a broker that creates topics by itself would make those that are asked for.
        described = {topic["topic"]: topic for topic in await admin.describe_topics()}
        found = self._readable(described)
        settled, self._found = found == self._found, found
        if not settled or found == self._read:
            return None
        if self._topics.prompts not in found:
            raise SetupError(f"{self._topics.prompts} does not exist any more", exit_code=3)
        self._read = found
        return found

    def _readable(self, described: dict[str, dict[str, Any]]) -> frozenset[str]:
        # One that is read already stays for as long as it is there: its leaders may be away for a moment.
        there = {name for name in self._topics.classes if name in described}
        wanted = len(described[self._topics.prompts]["partitions"]) if self._topics.prompts in there else 0
        unequal = frozenset(
            name for name in there - self._read if _is_led(described[name]) and len(described[name]["partitions"]) != wanted
        )
        for name in sorted(unequal - self._told):
            _log.warning("a topic does not fit", topic=name, reason=f"it is not read: it must have {wanted} partitions")
        self._told = unequal
        new = {name for name in there - self._read if _is_led(described[name])} - unequal
        return frozenset(there & self._read | new)


def _is_led(topic: dict[str, Any]) -> bool:
    partitions = topic["partitions"]
    return topic["error_code"] == 0 and bool(partitions) and all(partition["leader"] >= 0 for partition in partitions)
