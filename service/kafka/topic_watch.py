"""Topics of prompts under running replicas: which are read, which were deleted, which are another of the same name.

Asks the broker; what comes of the answers is the consumer's.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import structlog
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaConnectionError, KafkaError, UnknownTopicOrPartitionError

from service.kafka.ownership import OwnedPartition, Partitions
from service.kafka.prompt_topics import PromptTopics, is_another
from service.kafka.topic_look import TopicLook, look
from service.kafka.topics import Topics

_log = structlog.get_logger(__name__)

_LOOK_S = 5.0


class TopicWatch:
    """`admin` gives the connection of now, if there is one; `partitions` are those worked on."""

    def __init__(
        self, topics: Topics, admin: Callable[[], AIOKafkaAdminClient | None], partitions: Partitions, *, refresh_s: float
    ) -> None:
        self._topics, self._admin, self._partitions, self._refresh_s = topics, admin, partitions, refresh_s

    async def topic_id(self, topic: str) -> str:
        """The identity of a topic that is there, "" when the broker tells none. Raises `KafkaError`, `TimeoutError`."""
        found = (await self._look()).get(topic)
        if found is None:
            raise UnknownTopicOrPartitionError(topic)
        return found.topic_id

    async def is_deleted(self, owned: OwnedPartition) -> bool:
        """Whether the topic of `owned` is known to be there no longer; another of its name may be."""
        try:
            return is_another(owned.tracker.topic_id, await self.topic_id(owned.partition.topic))
        except UnknownTopicOrPartitionError:
            return True
        except (KafkaError, TimeoutError):
            return False

    async def follow(self, names: Mapping[str, str], change: Callable[[Mapping[str, str]], Awaitable[None]]) -> None:
        """Calls `change` with the topics to read and their identities whenever they have changed; never ends. Raises `SetupError`."""
        topics = PromptTopics(self._topics, names)
        while True:
            await asyncio.sleep(self._refresh_s)
            # Before the look: what it finds to be another is the newer one.
            held = tuple((owned.partition.topic, owned.tracker.topic_id) for owned in self._partitions)
            try:
                found = topics.changed(await self._look(), held)
            except (KafkaError, TimeoutError) as error:
                _log.info("the topics could not be looked at", error=type(error).__name__)
                continue
            if found is not None:
                _log.info("the topics of prompts have changed", topics=sorted(found))
                await change(found)

    async def _look(self) -> Mapping[str, TopicLook]:
        if (admin := self._admin()) is None:
            raise KafkaConnectionError("there is no connection to the group now")
        async with asyncio.timeout(_LOOK_S):
            return await look(admin)
