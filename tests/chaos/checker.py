"""The verdict on a run: a pure function of its recorded history. Shares no code with the service, and asks no broker.

`RULES` names the rules, each with its own count; what they mean stands at the functions below.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.chunk_rules import ChunkReader
from tests.chaos.history import Acknowledged, Barrier, History, Seen
from tests.chaos.progress import Done, done_of

RULES = (
    "lost",
    "duplicate",
    "wrong",
    "unasked",
    "dead_letter",
    "torn",
    "regressed",
    "unfinished",
    "aborted_visible",
    "readers_differ",
    "chunks",
    "metadata",
)

DEAD_LETTER_CODES = frozenset(
    {
        "invalid_json", "invalid_protobuf", "unknown_field", "invalid_field", "unsupported_content_type", "prompt_too_long",
        "too_many_tokens", "unknown_model", "crash_loop", "numeric_error", "out_of_memory", "engine_failed", "result_too_large",
        "reply_to_refused", "internal",
    }
)  # fmt: skip
"""Codes whose prompts go to the dead letters (the table in the README)."""

TOLERATED_CODES = frozenset({"crash_loop"})
"""What a good prompt may end with when the faults hit it again and again."""

MAX_EXAMPLES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One breach of a rule."""

    rule: str
    where: str
    what: str


@dataclass(slots=True, kw_only=True)
class Verdict:
    """All breaches, and facts that say how hard the run was."""

    violations: list[Violation] = field(default_factory=list)
    facts: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.violations

    @property
    def counts(self) -> dict[str, int]:
        """Breaches by rule, zeros included."""
        found = Counter(violation.rule for violation in self.violations)
        return {rule: found[rule] for rule in RULES}

    def report(self) -> dict[str, Any]:
        """For the JSON summary."""
        examples = [f"{one.rule}: {one.where}: {one.what}" for one in self.violations[:MAX_EXAMPLES]]
        return {"ok": self.ok, "violations": self.counts, "examples": examples, "facts": self.facts}


def check(history: History, *, at_least_once: bool = False) -> Verdict:
    """Judges a run that was let come to rest. `at_least_once` tolerates equal terminal records and progress that lags behind them."""
    verdict = Verdict()
    terminal = _by_request(history.view("committed", "results"))
    letters = _by_request(history.view("committed", "dlq"))
    asked = {f"{history.prompts_topic}-{one.partition}-{one.offset}": one for one in history.acknowledged}

    def found(rule: str, where: str, what: str) -> None:
        verdict.violations.append(Violation(rule=rule, where=where, what=what))

    _terminals(asked, terminal, found, at_least_once)
    _dead_letters(asked, terminal, letters, found, at_least_once)
    done = _commits(history, found, at_least_once)
    for barrier in history.barriers:
        _barrier(barrier, history, asked, terminal, letters, found, at_least_once)
    _last_progress(history, done, found)
    for topic in ("results", "dlq"):
        _readers(history, topic, found)
    readers = _chunks(history, terminal, found)
    verdict.facts = _facts(history, asked, terminal, readers)
    return verdict


Found = Callable[[str, str, str], None]
ByRequest = dict[str, list[Seen]]


def _by_request(records: Iterable[Seen]) -> ByRequest:
    found: ByRequest = defaultdict(list)
    for record in records:
        found[str((record.value or {}).get("request_id", ""))].append(record)
    return found


def _terminals(asked: dict[str, Acknowledged], terminal: ByRequest, found: Found, at_least_once: bool) -> None:
    """Each acknowledged prompt has exactly one terminal record, which says what this prompt has to be answered."""
    for request_id in terminal:
        if request_id not in asked:
            found("unasked", request_id, "a terminal record of a prompt that nobody sent")
    for request_id, prompt in asked.items():
        records = terminal.get(request_id, [])
        if prompt.kind == "tombstone":
            if records:
                found("wrong", request_id, "a tombstone has a terminal record")
            continue
        if not records:
            found("lost", request_id, f"no terminal record ({prompt.kind})")
        if len(records) > 1 and not at_least_once:
            found("duplicate", request_id, f"{len(records)} terminal records")
        for record in records:
            if difference := _difference(prompt, record):
                found("wrong", request_id, difference)


def _difference(prompt: Acknowledged, record: Seen) -> str:
    value = record.value or {}
    code = value.get("error", {}).get("code", "") if value.get("status") == "failed" else ""
    if record.partition != prompt.partition or record.key != value.get("request_id"):
        return f"stands on partition {record.partition} under the key {record.key}"
    if code in TOLERATED_CODES:
        return ""
    if code != prompt.error:
        return f"ended with {code or 'an answer'} instead of {prompt.error or 'an answer'}"
    if code:
        return ""
    said = [[int(token) for token in choice.get("token_ids", [])] for choice in value.get("choices", [])]
    if prompt.answers and said != [list(answer) for answer in prompt.answers]:
        return "the tokens are not those of an uninterrupted run"
    if [len(tokens) for tokens in said] != [prompt.num_tokens] * prompt.num_choices:
        return f"has {[len(tokens) for tokens in said]} tokens instead of {prompt.num_choices} x {prompt.num_tokens}"
    return ""


def _dead_letters(
    asked: dict[str, Acknowledged], terminal: ByRequest, letters: ByRequest, found: Found, at_least_once: bool
) -> None:
    """A terminal record whose code makes a dead letter has exactly one, and no other has any."""
    for request_id in set(letters) - set(asked):
        found("unasked", request_id, "a dead letter of a prompt that nobody sent")
    for request_id in asked:
        codes = {(record.value or {}).get("error", {}).get("code", "") for record in terminal.get(request_id, [])}
        wanted, there = int(bool(codes & DEAD_LETTER_CODES)), len(letters.get(request_id, []))
        if there != wanted and not (at_least_once and there > wanted == 1):
            found("dead_letter", request_id, f"{there} dead letters instead of {wanted}")


def _commits(history: History, found: Found, at_least_once: bool) -> dict[int, Done]:
    """Progress never goes back: what a commit says is done, every later commit says too; epochs never fall."""
    last: dict[int, Done] = {}
    for commit in sorted(history.committed, key=lambda one: one.position):
        where = f"partition {commit.partition}, commit {commit.position}"
        try:
            done = done_of(commit.offset, commit.metadata)
        except ValueError as error:
            found("metadata", where, f"cannot be read: {error}")
            continue
        before = last.get(commit.partition)
        if before is not None and not at_least_once:
            if lost := before.missing_from(done):
                found("regressed", where, f"{len(lost)} offsets are not done any more, the first is {lost[0]}")
            if done.epoch < before.epoch:
                found("regressed", where, f"epoch {done.epoch} after {before.epoch}")
        last[commit.partition] = done
    return last


def _barrier(
    barrier: Barrier,
    history: History,
    asked: dict[str, Acknowledged],
    terminal: ByRequest,
    letters: ByRequest,
    found: Found,
    at_least_once: bool,
) -> None:
    """While nothing runs, an offset is done if and only if its terminal record is visible, and its dead letter with it."""
    done = done_of(barrier.offset, barrier.metadata)
    for request_id, prompt in asked.items():
        if prompt.partition != barrier.partition or prompt.kind == "tombstone":
            continue
        where = f"{request_id} at {barrier.name}"
        is_written = any(record.offset < barrier.results_end for record in terminal.get(request_id, []))
        if prompt.offset in done and not is_written:
            found("torn", where, "done without a terminal record")
        elif is_written and prompt.offset not in done and not at_least_once:
            found("torn", where, "a terminal record whose offset is not done")
        has_letter = any(
            record.offset < barrier.dlq_ends.get(str(record.partition), 0) for record in letters.get(request_id, [])
        )
        if prompt.error in DEAD_LETTER_CODES and has_letter != is_written and not at_least_once:
            found("torn", where, "dead letter and terminal record do not stand together")
        elif prompt.error in DEAD_LETTER_CODES and prompt.offset in done and not has_letter:
            found("torn", where, "done without its dead letter")


def _last_progress(history: History, done: dict[int, Done], found: Found) -> None:
    """When all has come to rest, the committed progress covers every prompt and nothing past the end of the log."""
    ends: dict[int, int] = {}
    for prompt in history.acknowledged:
        ends[prompt.partition] = max(ends.get(prompt.partition, 0), prompt.offset + 1)
    for partition, end in ends.items():
        last = done.get(partition)
        if last is None or last.low < end:
            found(
                "unfinished",
                f"partition {partition}",
                f"progress stands at {last.low if last else None}, the log ends at {end}",
            )
        elif last.low > end:
            found("unfinished", f"partition {partition}", f"progress stands at {last.low}, past the log's end {end}")


def _readers(history: History, topic: str, found: Found) -> None:
    """A fresh reader and one that read along saw the same; neither saw what an uncommitted reader does not know as it is."""
    fresh, along, everything = (
        {(one.partition, one.offset): one.value for one in history.view(view, topic)}
        for view in ("committed", "concurrent", "uncommitted")
    )
    for place in sorted(set(along) - set(fresh)):
        found("aborted_visible", f"{topic}{place}", "was shown to a read_committed reader, and is not committed")
    for place in sorted(set(fresh) - set(along)):
        found("readers_differ", f"{topic}{place}", "the reader that read along has missed it")
    for place in sorted(set(fresh) & set(along)):
        if fresh[place] != along[place]:
            found("readers_differ", f"{topic}{place}", "two readers saw different records")
    for place in sorted(set(fresh) - set(everything)):
        found("readers_differ", f"{topic}{place}", "is committed, and an uncommitted reader does not see it")


def _chunks(history: History, terminal: ByRequest, found: Found) -> dict[str, ChunkReader]:
    """Each request's chunk stream, read by the epoch rules, is its terminal record's text and tokens."""
    readers: dict[str, ChunkReader] = defaultdict(ChunkReader)
    for record in history.view("uncommitted", "chunks"):
        value = record.value or {}
        reader = readers[str(value.get("request_id", record.key))]
        if record.type == "started":
            reader.started(value)
        elif record.type == "chunk":
            reader.chunk(value)
    for request_id, records in terminal.items():
        value = records[0].value or {}
        if value.get("status") == "failed":
            continue
        for difference in readers[request_id].against(value.get("choices", [])):
            found("chunks", request_id, difference)
    return readers


def _facts(
    history: History, asked: dict[str, Acknowledged], terminal: ByRequest, readers: dict[str, ChunkReader]
) -> dict[str, int]:
    committed, everything = history.view("committed", "results"), history.view("uncommitted", "results")
    codes = Counter((one.value or {}).get("error", {}).get("code", "") for one in committed)
    return {
        "prompts": len(asked),
        "terminal_records": len(committed),
        "repeated_terminal_records": sum(len(records) - 1 for records in terminal.values()),
        "aborted_records": len(everything) - len(committed),
        "dead_letters": len(history.view("committed", "dlq")),
        "chunk_records": len(history.view("uncommitted", "chunks")),
        "streams_started_again": sum(reader.num_starts > 1 for reader in readers.values()),
        "zombie_records_passed_over": sum(reader.num_passed_over for reader in readers.values()),
        "offset_commits": len(history.committed),
        "barriers": len({barrier.name for barrier in history.barriers}),
        "crash_loop": codes["crash_loop"],
    }
