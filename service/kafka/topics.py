"""Topic names, their settings, and their creation. Whether a cluster's topics fit together: `topic_check.py`."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import TopicAlreadyExistsError, for_code

from service.errors import RequestError, SetupError
from service.kafka.budget import QueueClass
from service.kafka.embedded import embedded_cluster
from service.kafka.records import TopicPartition

CLASSES: tuple[QueueClass, ...] = ("interactive", "standard", "batch")
WEIGHTS: dict[QueueClass, int] = {"interactive": 8, "standard": 4, "batch": 1}
"""Turns that a class's partitions get in one rotation of the poll loop."""
_HOUR_MS = 3_600_000
_REPLICAS = 3


@dataclass(frozen=True, slots=True)
class Topics:
    """The names under one prefix."""

    prefix: str

    @property
    def prompts(self) -> str:
        return f"{self.prefix}prompts"

    @property
    def results(self) -> str:
        return f"{self.prefix}results"

    @property
    def chunks(self) -> str:
        return f"{self.prefix}chunks"

    @property
    def dead_letters(self) -> str:
        return f"{self.prefix}dlq"

    @property
    def control(self) -> str:
        return f"{self.prefix}control"

    @property
    def classes(self) -> dict[str, QueueClass]:
        """Every topic that may hold prompts, with its class; `prompts` itself is standard. Those of a class are optional."""
        return {self.prompts: "standard", **{self.of_class(name): name for name in CLASSES}}

    def of_class(self, name: QueueClass) -> str:
        """The optional topic of a class."""
        return f"{self.prompts}.{name}"

    @property
    def required(self) -> tuple[str, ...]:
        """The topics that must exist."""
        return (self.prompts, self.results, self.chunks, self.dead_letters, self.control)

    def policies(self) -> dict[str, dict[str, str]]:
        """Configuration of each topic as `create` makes it; times in milliseconds."""
        return {
            **{name: {"cleanup.policy": "delete"} for name in self.classes},
            self.results: {"cleanup.policy": "compact,delete"},
            self.chunks: {"cleanup.policy": "delete", "retention.ms": str(24 * _HOUR_MS)},
            self.dead_letters: {"cleanup.policy": "delete", "retention.ms": str(28 * 24 * _HOUR_MS)},
            self.control: {"cleanup.policy": "delete", "retention.ms": str(24 * _HOUR_MS)},
        }


def turns(weights: Mapping[TopicPartition, int]) -> list[TopicPartition]:
    """One rotation of the poll loop: each partition as often as it weighs against the lightest that is there, spread out."""
    lightest = min(weights.values(), default=1)
    rounds = max(weights.values(), default=0) // lightest
    return [partition for turn in range(rounds) for partition, weight in weights.items() if weight > turn * lightest]


def class_named(name: str) -> QueueClass:
    """The class of this name. Raises `RequestError`."""
    for known in CLASSES:
        if name == known:
            return known
    raise RequestError("invalid_field", f"must be one of {', '.join(CLASSES)}, or be left away", field="queue_class")


async def to_write(topics: Topics, queue_class: str, exists: Callable[[str], Awaitable[bool]]) -> str:
    """Where prompts of a class go: to its topic; to `prompts` when none is named, and for `standard` where it has none of its own.

    Raises `RequestError` for a class that there is not, or that has no topic; what `exists` raises.
    """
    if not queue_class:
        return topics.prompts
    topic = topics.of_class(class_named(queue_class))
    if await exists(topic):
        return topic
    if queue_class == topics.classes[topics.prompts]:
        return topics.prompts
    message = f"has no topic here: `sluice topics create --class {queue_class}` makes {topic}"
    raise RequestError("invalid_field", message, field="queue_class")


async def create(
    admin: AIOKafkaAdminClient,
    topics: Topics,
    *,
    partitions: int,
    replication_factor: int = -1,
    classes: Sequence[QueueClass] = (),
) -> tuple[str, ...]:
    """Creates the topics that are missing, those of `classes` too, and names them.

    Raises `KafkaError` when the broker refuses one, `SetupError` on the embedded broker.

    A class's topic gets as many partitions as `prompts` has, where that exists: a result stands on its prompt's partition.
    `replication_factor` -1: three, or as many as there are brokers. (aiokafka cannot ask for the broker's own default.)
    """
    optional = [topics.of_class(name) for name in classes]
    existing = await count_partitions(admin, (*topics.required, *optional))
    missing = [name for name in (*topics.required, *optional) if name not in existing]
    if not missing:
        return ()
    if await embedded_cluster(admin):
        raise SetupError(
            f"no topic {missing[0]}, and the embedded broker makes its topics at its start alone: the {len(topics.required)} of "
            "kafka.topic_prefix with kafka.partitions; start `sluice serve` with those, or use a Kafka broker"
        )
    if replication_factor < 1:
        replication_factor = min(_REPLICAS, len((await admin.describe_cluster())["brokers"]))
    policies = topics.policies()
    response = await admin.create_topics(
        [
            NewTopic(
                name,
                num_partitions=existing.get(topics.prompts, partitions) if name in optional else partitions,
                replication_factor=replication_factor,
                topic_configs=policies[name],
            )
            for name in missing
        ]
    )
    for name, code, *rest in response.topic_errors:
        error = for_code(code)
        # Another replica may have been faster.
        if code != 0 and error is not TopicAlreadyExistsError:
            raise error(f"topic {name}: {rest[0] if rest else ''}")
    return tuple(missing)


async def count_partitions(admin: AIOKafkaAdminClient, names: Iterable[str]) -> dict[str, int]:
    """Partitions of each of `names` that exists and may be seen."""
    existing = set(await admin.list_topics())
    wanted = sorted({name for name in names if name in existing})
    return {topic["topic"]: len(topic["partitions"]) for topic in await admin.describe_topics(wanted)} if wanted else {}
