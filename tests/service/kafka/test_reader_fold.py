"""What a reader is shown: the final tokens, each once, whatever owners, zombies and duplicates have written."""

import random
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.v1 import events_pb2, inference_pb2
from service.contract import Delta, Failed, Finished, ReaderEvent, Reset, Started
from service.kafka.chunk_records import ChunkMessage, Said
from service.kafka.reader_fold import ReaderFold, Terminal

ID = "t.prompts-0-1"
LENGTH, CHOICES = 24, 2


def word(token: int) -> str:
    return "" if token % 5 == 0 else f"<{token}>"


def text_of(tokens: Iterable[int]) -> str:
    return "".join(map(word, tokens))


class Owner:
    """One attempt that goes on from what the log held when it looked; `offset` makes it say other tokens than others do."""

    def __init__(self, epoch: int, log: list[ChunkMessage], offset: int = 0) -> None:
        self.epoch, self._offset = epoch, offset
        said = Said(first_offset=0)
        for message in log:
            said.feed(message)
        self.said = [list(ids) for ids in said.token_ids] or [[] for _ in range(CHOICES)]
        self._resume_from = [len(ids) for ids in self.said]

    @property
    def finished(self) -> bool:
        return all(len(ids) == LENGTH for ids in self.said)

    def started(self) -> events_pb2.Started:
        return events_pb2.Started(request_id=ID, epoch=self.epoch, attempt=1, resume_from=self._resume_from, seed=7, model="m")

    def chunk(self, chance: random.Random) -> events_pb2.Chunk | None:
        """The next tokens of some choice."""
        open_choices = [index for index, ids in enumerate(self.said) if len(ids) < LENGTH]
        if not open_choices:
            return None
        index = chance.choice(open_choices)
        ids = self.said[index]
        seq = len(ids)
        new = [100 * index + position + self._offset for position in range(seq, min(LENGTH, seq + chance.randint(1, 6)))]
        text_offset = len(text_of(ids))
        ids += new
        return events_pb2.Chunk(
            request_id=ID,
            choice=index,
            epoch=self.epoch,
            attempt=1,
            seq=seq,
            token_ids=new,
            text=text_of(new),
            text_offset=text_offset,
        )

    def result(self) -> inference_pb2.Result:
        choices = [
            inference_pb2.Choice(index=index, token_ids=ids, text=text_of(ids), finish_reason=inference_pb2.FinishReason.length)
            for index, ids in enumerate(self.said)
        ]
        return inference_pb2.Result(
            request_id=ID, status=inference_pb2.Result.finished, choices=choices, seed=7, epoch=self.epoch, model="m"
        )


def history(chance: random.Random, *, differing: bool) -> tuple[list[ChunkMessage], Owner]:
    """A log as owners write it that die, go on as zombies, and repeat themselves; and the owner that finished."""
    log: list[ChunkMessage] = []
    zombies: list[Owner] = []
    epoch = 0
    while True:
        epoch += chance.randint(1, 2)
        owner = Owner(epoch, log, offset=1_000 * epoch if differing and chance.random() < 0.5 else 0)
        if zombies and chance.random() < 0.5:
            # Between a new owner's look at the log and its first record the old one still writes.
            log += filter(None, (zombies[-1].chunk(chance),))
        log.append(owner.started())
        for _ in range(chance.randint(0, 8) if epoch < 12 else 1_000):
            if owner.finished:
                return log, owner
            if zombies and chance.random() < 0.3:
                log += filter(None, (chance.choice(zombies).chunk(chance),))
            if chance.random() < 0.15:
                log.append(chance.choice(log))
            log += filter(None, (owner.chunk(chance),))
        if chance.random() < 0.3:
            log.append(events_pb2.Handover(request_id=ID, epoch=epoch, resume_from=[len(ids) for ids in owner.said]))
        zombies.append(owner)


class Reader:
    """Keeps what the events say, as any client would, and fails on a gap or a repetition."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(CHOICES)]
        self.texts = [""] * CHOICES
        self.voided = 0
        self.kinds: list[type] = []

    def see(self, events: Iterable[ReaderEvent]) -> None:
        for event in events:
            self.kinds.append(type(event))
            if isinstance(event, Reset):
                self.voided += sum(len(ids) > kept for ids, kept in zip(self.tokens, event.resume_from, strict=True))
                for ids, kept in zip(self.tokens, event.resume_from, strict=True):
                    del ids[kept:]
            elif isinstance(event, Delta):
                assert event.seq == len(self.tokens[event.choice])
                self.tokens[event.choice] += event.token_ids
                assert event.text_offset <= len(self.texts[event.choice])
                self.texts[event.choice] = self.texts[event.choice][: event.text_offset] + event.text


def read(log: list[ChunkMessage], owner: Owner, chance: random.Random, *, leaving: float = 0.05) -> Reader:
    """Reads it, leaving and coming back now and then: a new fold that is told how far the reader has come."""
    reader = Reader()
    fold = ReaderFold(ID)
    for position, message in enumerate(log):
        reader.see(fold.take(message))
        if chance.random() < leaving:
            fold = ReaderFold(ID, [len(ids) for ids in reader.tokens])
            for earlier in log[: position + 1]:
                reader.see(fold.take(earlier))
    reader.see(fold.take(Terminal(result=owner.result())))
    return reader


@given(st.integers(0, 2**32).map(random.Random))
@settings(max_examples=300, deadline=None)
def test_owners_that_agree_are_read_as_one_uninterrupted_run(chance):
    log, owner = history(chance, differing=False)
    reader = read(log, owner, chance)
    assert reader.tokens == [[100 * index + position for position in range(LENGTH)] for index in range(CHOICES)]
    assert reader.texts == [text_of(ids) for ids in reader.tokens]
    assert (reader.voided, reader.kinds[-1]) == (0, Finished)


@given(st.integers(0, 2**32).map(random.Random))
@settings(max_examples=300, deadline=None)
def test_whatever_owners_say_the_reader_ends_with_the_result(chance):
    log, owner = history(chance, differing=True)
    # One who comes back tells how many tokens it has, not which: what it has is taken to be what the log says.
    reader = read(log, owner, chance, leaving=0.0)
    assert reader.tokens == owner.said
    assert reader.texts == [text_of(ids) for ids in owner.said]


@given(st.integers(0, 2**32).map(random.Random))
@settings(max_examples=100, deadline=None)
def test_missing_records_are_made_up_for_by_the_result(chance):
    log, owner = history(chance, differing=False)
    kept = [message for message in log if chance.random() < 0.7]
    reader = read(kept, owner, chance)
    assert (reader.tokens, reader.texts) == (owner.said, [text_of(ids) for ids in owner.said])


@given(st.integers(0, 2**32).map(random.Random))
@settings(max_examples=300, deadline=None)
def test_a_reader_is_given_exactly_what_follows_the_tokens_that_it_has(chance):
    log, owner = history(chance, differing=False)
    after = [chance.randint(0, LENGTH) for _ in range(CHOICES)]
    # Now and then it comes when nothing but the result is left.
    messages = [*(log if chance.random() < 0.7 else ()), Terminal(result=owner.result())]
    fold = ReaderFold(ID, after, num_characters=lambda model, ids: len(text_of(ids)))
    deltas = [event for message in messages for event in fold.take(message) if isinstance(event, Delta)]
    for index, ids in enumerate(owner.said):
        seen = [delta for delta in deltas if delta.choice == index]
        assert [token for delta in seen for token in delta.token_ids] == ids[after[index] :]
        assert "".join(delta.text for delta in seen) == text_of(ids[after[index] :])
        assert seen[0].text_offset == len(text_of(ids[: after[index]]))


def test_a_reader_that_tells_its_text_is_given_what_follows_it():
    fold = ReaderFold(ID, [2], [1], num_characters=lambda model, ids: len(ids))
    (_, delta) = [event for message in (started(1, 0), chunk(0, [1, 2, 3])) for event in fold.take(message)]
    assert (delta.seq, delta.token_ids, delta.text, delta.text_offset) == (2, (3,), "xx", 1)


def test_text_is_given_from_earlier_where_the_tokens_before_are_gone():
    fold = ReaderFold(ID, [3], num_characters=lambda model, ids: len(ids))
    (_, delta) = [
        event for message in (started(2, 2), chunk(2, [3, 4], epoch=2, text_offset=2)) for event in fold.take(message)
    ]
    assert (delta.seq, delta.token_ids, delta.text, delta.text_offset) == (3, (4,), "xx", 2)


def chunk(seq: int, ids: list[int], *, epoch: int = 1, text_offset: int = 0) -> events_pb2.Chunk:
    return events_pb2.Chunk(
        request_id=ID, epoch=epoch, attempt=1, seq=seq, token_ids=ids, text="x" * len(ids), text_offset=text_offset
    )


def started(epoch: int, resume_from: int) -> events_pb2.Started:
    return events_pb2.Started(
        request_id=ID, epoch=epoch, attempt=1, resume_from=[resume_from], traceparent=f"00-{'a' * 32}-{'b' * 16}-01"
    )


def test_a_hand_over_is_announced_without_a_repeated_token():
    fold = ReaderFold(ID)
    events = [event for message in (started(1, 0), chunk(0, [1, 2]), started(2, 2)) for event in fold.take(message)]
    assert events[2] == Reset(epoch=2, resume_from=(2,))
    (after,) = fold.take(chunk(2, [3], epoch=2, text_offset=2))
    assert (after.seq, after.token_ids, after.text_offset) == (2, (3,), 2)


def test_what_a_zombie_said_beyond_the_hand_over_is_not_said_twice():
    fold = ReaderFold(ID)
    for message in (started(1, 0), chunk(0, [1, 2]), chunk(2, [3, 4], text_offset=2), started(2, 2)):
        list(fold.take(message))
    (delta,) = fold.take(chunk(2, [3, 4, 5], epoch=2, text_offset=2))
    assert (delta.seq, delta.token_ids, delta.text, delta.text_offset) == (4, (5,), "x", 4)


def test_a_token_that_differs_voids_what_was_given_from_there_on():
    fold = ReaderFold(ID)
    for message in (started(1, 0), chunk(0, [1, 2]), chunk(2, [3, 4], text_offset=2), started(2, 2)):
        list(fold.take(message))
    reset, delta = fold.take(chunk(2, [3, 9], epoch=2, text_offset=2))
    assert reset == Reset(epoch=2, resume_from=(3,))
    assert (delta.seq, delta.token_ids, delta.text_offset) == (3, (9,), 2)


def test_a_past_request_is_read_from_its_result_alone():
    owner = Owner(4, [])
    while not owner.finished:
        owner.chunk(random.Random(1))
    fold = ReaderFold(ID, [20, 24])
    events = list(fold.take(Terminal(result=owner.result())))
    assert [type(event) for event in events] == [Started, Delta, Delta, Finished]
    assert [(event.seq, len(event.token_ids), event.finish_reason) for event in events[1:3]] == [
        (20, 4, "length"),
        (24, 0, "length"),
    ]


def test_a_refused_request_only_fails():
    result = inference_pb2.Result(
        request_id=ID, status=inference_pb2.Result.failed, error=inference_pb2.Error(code="unknown_model", message="no")
    )
    (event,) = ReaderFold(ID).take(Terminal(result=result))
    assert isinstance(event, Failed)
    assert event.error.code == "unknown_model"


def test_the_trace_is_that_of_the_latest_attempt():
    fold = ReaderFold(ID)
    (event,) = fold.take(started(1, 0))
    assert (event.trace_id, fold.traceparent) == ("a" * 32, f"00-{'a' * 32}-{'b' * 16}-01")
