"""What was seen of a run, apart from any client library: what the checker judges, and what is saved for a second look.

Saved as JSON lines in a gzip file: `[class, fields]` a line after a head line.
"""

import gzip
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

View = Literal["committed", "uncommitted", "concurrent"]
"""A fresh read_committed reader, a fresh read_uncommitted one, and a read_committed one that read along during the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledged:
    """A prompt record that the broker acknowledged to its producer, with what must come of it (see `PromptSpec`)."""

    partition: int
    offset: int
    kind: str
    num_tokens: int = 0
    num_choices: int = 1
    answers: tuple[tuple[int, ...], ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A record on a topic. `topic` without its prefix: results, dlq or chunks. `value` is the JSON object, None for none."""

    view: View
    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: str
    type: str
    value: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """An offset commit of the group as the broker keeps it, in the order of its log (read_committed)."""

    position: int
    partition: int
    offset: int
    metadata: str
    timestamp_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Barrier:
    """A moment at which no replica lived and no transaction was open: what stood there for one input partition.

    `results_end` and `dlq_ends` are the ends of the logs at that moment. A partition without a commit has no barrier.
    """

    name: str
    partition: int
    offset: int
    metadata: str
    results_end: int
    dlq_ends: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class History:
    """Everything that was seen."""

    acknowledged: list[Acknowledged] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    committed: list[Committed] = field(default_factory=list)
    barriers: list[Barrier] = field(default_factory=list)
    prompts_topic: str = "sluice.prompts"

    def view(self, view: View, topic: str) -> list[Seen]:
        """One reader's records of one topic, in the order of each partition's log."""
        return sorted(
            (one for one in self.seen if one.view == view and one.topic == topic), key=lambda one: (one.partition, one.offset)
        )

    def save(self, path: Path) -> None:
        """Writes all of it."""
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write(json.dumps({"type": "History", "prompts_topic": self.prompts_topic}) + "\n")
            parts: tuple[Iterable[Any], ...] = (self.acknowledged, self.seen, self.committed, self.barriers)
            for part in parts:
                for one in part:
                    # `Seen` has a field of the name `type`.
                    file.write(json.dumps([type(one).__name__, asdict(one)]) + "\n")

    @classmethod
    def load(cls, path: Path) -> "History":
        """Reads what `save` wrote."""
        history = cls()
        with gzip.open(path, "rt", encoding="utf-8") as file:
            history.prompts_topic = json.loads(next(file))["prompts_topic"]
            for line in file:
                name, fields = json.loads(line)
                if name == "Acknowledged":
                    fields["answers"] = tuple(tuple(answer) for answer in fields["answers"])
                    history.acknowledged.append(Acknowledged(**fields))
                elif name == "Seen":
                    history.seen.append(Seen(**fields))
                elif name == "Committed":
                    history.committed.append(Committed(**fields))
                else:
                    history.barriers.append(Barrier(**fields))
        return history
