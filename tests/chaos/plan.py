"""The plan of a run: which faults come when, drawn from a seed. A replay file holds it whole: to be run again, or cut down by hand."""

import json
import random
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

FaultKind = Literal[
    "kill",  # SIGKILL to a replica; another process takes its slot after `for_s`
    "pause",  # SIGSTOP for `for_s`
    "term",  # SIGTERM, which drains; then a new process
    "engine",  # SIGKILL to a replica's engine child
    "extra",  # one replica more for `for_s`: two rebalances
    "broker-kill",  # SIGKILL to a broker; started again after `for_s`
    "delay",  # `amount` seconds more each way for `for_s`
    "slow-commits",  # requests that move progress wait `amount` seconds, for `for_s`
    "cut",  # every connection of one broker's proxy ends
    "half-open",  # nothing passes one broker's proxy for `for_s`, then all its connections are cut
    "lost-answer",  # the next commit request reaches the broker, its answer never arrives
    "late-commit",  # the next commit request's connection is cut, the broker gets it `amount` seconds later
    "delete-input",  # input records below the committed offsets are deleted
    "barrier",  # every replica is killed, open transactions are ended, progress is compared with what was written; all start again
]

NETWORK_KINDS: tuple[FaultKind, ...] = ("delay", "slow-commits", "cut", "half-open", "lost-answer", "late-commit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault. `target`: the replica's or broker's number, taken modulo how many there are."""

    at_s: float
    kind: FaultKind
    target: int = 0
    for_s: float = 0.0
    amount: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How large a run is and how many faults of each sort it has. Everything else is drawn."""

    prompts: int = 2_000
    duration_s: float = 180.0
    """Prompts and faults are spread over this time."""
    replicas: int = 3
    brokers: int = 3
    partitions: int = 6
    replica_kills: int = 20
    broker_kills: int = 3
    pauses: int = 3
    terms: int = 2
    engine_kills: int = 3
    network: int = 8
    rebalances: int = 1
    deletions: int = 2
    barriers: int = 2
    min_tokens: int = 16
    max_tokens: int = 64
    tokens_per_s: float = 40.0
    session_timeout_ms: int = 3_000
    bad_prompts: int = 1
    """How many times as many bad prompts as usual (about one in eight)."""
    static_members: bool = True
    """Every other replica keeps its name in the group over restarts."""

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Shape":
        """From a replay file; unknown names are refused."""
        known = {one.name for one in fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(f"the replay file names {sorted(unknown)}, which this version does not know")
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A seed, a shape, and the faults drawn from them."""

    seed: int
    shape: Shape
    faults: tuple[Fault, ...]

    def save(self, path: Path) -> None:
        """Writes the replay file."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Reads a replay file."""
        values = json.loads(path.read_text("utf-8"))
        faults = tuple(Fault(**one) for one in values["faults"])
        return cls(seed=values["seed"], shape=Shape.of(values["shape"]), faults=faults)


def draw_plan(seed: int, shape: Shape) -> Plan:
    """The plan of a seed."""
    draw = random.Random(f"plan-{seed}")
    session_s = shape.session_timeout_ms / 1_000
    faults: list[Fault] = []

    def add(
        kind: FaultKind, count: int, *, for_s: tuple[float, float] = (0.0, 0.0), amount: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        # One in each of `count` equal parts of the time: seeds differ in where, no seed has all at once.
        part_s = 0.9 * shape.duration_s / max(count, 1)
        faults.extend(
            Fault(
                at_s=round(0.05 * shape.duration_s + part_s * (index + draw.random()), 2),
                kind=kind,
                target=draw.randrange(60),
                for_s=round(draw.uniform(*for_s), 2),
                amount=round(draw.uniform(*amount), 3),
            )
            for index in range(count)
        )

    add("kill", shape.replica_kills, for_s=(0.0, 2.0))
    add("pause", shape.pauses, for_s=(session_s * 1.3, session_s * 2.5))
    add("term", shape.terms)
    add("engine", shape.engine_kills)
    add("extra", shape.rebalances, for_s=(3.0, 8.0))
    add("broker-kill", shape.broker_kills, for_s=(1.0, 6.0))
    add("delete-input", shape.deletions)
    add("barrier", shape.barriers)
    kinds = list(NETWORK_KINDS)
    draw.shuffle(kinds)
    for index in range(shape.network):
        kind = kinds[index % len(kinds)]
        at_s = 0.05 * shape.duration_s + 0.9 * shape.duration_s * (index + draw.random()) / shape.network
        amounts = {"delay": (0.02, 0.3), "slow-commits": (0.2, 3.0), "late-commit": (0.5, 8.0)}
        faults.append(
            Fault(
                at_s=round(at_s, 2),
                kind=kind,
                target=draw.randrange(60),
                for_s=round(draw.uniform(2.0, 8.0), 2),
                amount=round(draw.uniform(*amounts.get(kind, (0.0, 0.0))), 3),
            )
        )
    return Plan(seed=seed, shape=shape, faults=tuple(sorted(faults, key=lambda fault: (fault.at_s, fault.kind, fault.target))))
