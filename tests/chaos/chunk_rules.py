"""A reader of the chunk topic that follows the epoch rules, and says where the stream breaks them.

The rules (wire contract): a `started` record opens an attempt and says from which token on earlier ones are to be dropped; a reader
keeps the highest epoch that it has seen and passes over what lower ones say; within an attempt, sequence numbers count tokens
without gap or repetition.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class _Choice:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    resumed: bool = False


@dataclass(slots=True)
class ChunkReader:
    """One request's stream; feed its records in the order of the log."""

    epoch: int = 0
    choices: dict[int, _Choice] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    num_starts: int = 0
    num_passed_over: int = 0

    def started(self, value: dict[str, Any]) -> None:
        """Opens an attempt."""
        epoch = int(value.get("epoch", 0))
        if epoch < self.epoch:
            self.num_passed_over += 1
            return
        self.epoch = epoch
        self.num_starts += 1
        resume_from = [int(number) for number in value.get("resume_from", [])]
        for index, choice in self.choices.items():
            keep = resume_from[index] if index < len(resume_from) else 0
            if keep > len(choice.tokens):
                self.faults.append(f"epoch {epoch} resumes choice {index} at token {keep}; {len(choice.tokens)} were said")
            del choice.tokens[keep:]
            choice.resumed = True
        for index, keep in enumerate(resume_from):
            if keep and index not in self.choices:
                self.faults.append(f"epoch {epoch} resumes choice {index} at token {keep}; none was said")

    def chunk(self, value: dict[str, Any]) -> None:
        """Adds tokens."""
        epoch = int(value.get("epoch", 0))
        if epoch < self.epoch:
            self.num_passed_over += 1
            return
        if epoch > self.epoch or not self.num_starts:
            self.faults.append(f"a chunk of epoch {epoch} came before its attempt was opened")
            self.epoch = epoch
        choice = self.choices.setdefault(int(value.get("choice", 0)), _Choice())
        seq = int(value.get("seq", 0))
        if seq != len(choice.tokens):
            what = "repeats" if seq < len(choice.tokens) else "misses"
            self.faults.append(f"epoch {epoch} {what} tokens: seq {seq} where {len(choice.tokens)} comes next")
            del choice.tokens[seq:]
        choice.tokens.extend(int(token) for token in value.get("token_ids", []))
        offset = int(value.get("text_offset", 0))
        if offset > len(choice.text) or (offset < len(choice.text) and not choice.resumed):
            self.faults.append(f"epoch {epoch}: text_offset {offset} where {len(choice.text)} comes next")
        choice.text = choice.text[:offset] + value.get("text", "")
        choice.resumed = False

    def against(self, choices: list[dict[str, Any]]) -> list[str]:
        """How the stream differs from the choices of the terminal record."""
        differences = list(self.faults)
        for index, final in enumerate(choices):
            said = self.choices.get(int(final.get("index", index)), _Choice())
            wanted = [int(token) for token in final.get("token_ids", [])]
            if said.tokens != wanted:
                differences.append(
                    f"choice {index}: the stream has {len(said.tokens)} tokens, the result {len(wanted)}, not equal"
                )
            elif said.text != final.get("text", ""):
                differences.append(f"choice {index}: the stream's text is not the result's")
        return differences
