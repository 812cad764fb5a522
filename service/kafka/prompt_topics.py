"""Which topics of prompts a cluster has, looked at again and again: one of a class may come, go, or be made anew while replicas run.

Guarantee: a topic counts as come only once each of its partitions has a leader and there are as many as `prompts` has; nothing counts
as changed before two looks in a row have found the same. One that was made anew is another topic: the old one goes, the new one comes,
also when no look ever saw the old one.
"""

from collections.abc import Iterable, Mapping, Set

import structlog

from service.errors import SetupError
from service.kafka.topic_look import TopicLook
from service.kafka.topics import Topics

_log = structlog.get_logger(__name__)


class PromptTopics:
    """What is read now, and what the last look found: topics with their identities."""

    def __init__(self, topics: Topics, read: Mapping[str, str]) -> None:
        self._topics = topics
        self._read = self._found = dict(read)
        self._told: frozenset[str] = frozenset()

    def changed(self, seen: Mapping[str, TopicLook], held: Iterable[tuple[str, str]] = ()) -> Mapping[str, str] | None:
        """The topics to read from now on, with their identities, when they are others than until now.

        `held`: topics whose partitions are worked on, with the identities that those were opened under.
        Raises `SetupError` when `prompts` itself is gone.
        """
        # One that was opened and made anew before the first look: only what is held tells.
        before = (*self._read.items(), *held)
        anew = {name for name, was in before if name in seen and is_another(was, seen[name].topic_id)}
        found = self._readable(seen, anew)
        settled, self._found = found == self._found, found
        if not settled:
            return None
        if found.keys() == self._read.keys() and not anew:
            self._read = found
            return None
        if self._topics.prompts not in found:
            raise SetupError(f"{self._topics.prompts} does not exist any more", exit_code=3)
        self._read = found
        return found

    def _readable(self, seen: Mapping[str, TopicLook], anew: Set[str]) -> dict[str, str]:
        # One that is read already stays for as long as it is there: its leaders may be away for a moment.
        there = {name: seen[name] for name in self._topics.classes if name in seen}
        new = {name for name in there if name not in self._read or name in anew}
        wanted = there[self._topics.prompts].num_partitions if self._topics.prompts in there else 0
        unequal = frozenset(name for name in new if there[name].led and there[name].num_partitions != wanted)
        for name in sorted(unequal - self._told):
            _log.warning("a topic does not fit", topic=name, reason=f"it is not read: it must have {wanted} partitions")
        self._told = unequal
        # In the order of the classes, and with the identity that is known where a broker tells none now.
        return {
            name: look.topic_id or self._read.get(name, "")
            for name, look in there.items()
            if name not in new or (look.led and name not in unequal)
        }


def is_another(topic_id: str, other: str) -> bool:
    """Whether two identities of one name are known to be of two topics."""
    return bool(topic_id and other and topic_id != other)
