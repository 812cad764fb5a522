"""Where `tail` begins, and that it shows tokens once, also when it comes in the middle."""

import pytest

from schemas.v1 import events_pb2, inference_pb2
from service import wire
from service.cli.kafka import _await_results
from service.cli.tail import Start, _lines, _show, starting
from service.contract import Source
from service.errors import SetupError
from service.kafka.chunk_records import ChunkMessage, chunk_record
from service.kafka.reader_fold import ReaderFold
from tests.service.kafka.fakes import FakeRecord

SOURCE = Source(topic="t.prompts", partition=0, offset=3)
NOW_S = 1_700_000_000.0


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("beginning", Start("beginning")),
        ("end", Start("end")),
        ("1200", Start("offset", 1_200)),
        ("15m", Start("time", 1_699_999_100_000)),
        ("2d", Start("time", 1_699_827_200_000)),
        ("2023-11-14T22:13:20Z", Start("time", 1_700_000_000_000)),
        ("2023-11-14T23:13:20+01:00", Start("time", 1_700_000_000_000)),
    ],
)
def test_from_names_a_place(text: str, start: Start) -> None:
    assert starting(text, NOW_S) == start


@pytest.mark.parametrize("text", ["", "banana", "-1", "2023-11-14T22:13:20", "15x", "1.5", "9" * 30])
def test_from_that_names_none_says_what_to_write(text: str) -> None:
    with pytest.raises(SetupError, match="15m"):
        starting(text, NOW_S)


def shown(*messages: ChunkMessage, raw: bool = False) -> list[dict[str, object]]:
    folds: dict[str, ReaderFold] = {}
    lines: list[dict[str, object]] = []
    for offset, message in enumerate(messages):
        out = chunk_record("t.chunks", SOURCE, message, wire.JSON)
        record = FakeRecord(out.value, offset=offset, topic=out.topic, key=out.key, headers=out.headers)
        lines += _lines(record, "chunks", raw, folds)
    return lines


def chunk(seq: int, *ids: int, epoch: int = 1) -> events_pb2.Chunk:
    return events_pb2.Chunk(
        request_id=SOURCE.request_id, epoch=epoch, attempt=1, seq=seq, token_ids=ids, text="x" * len(ids), text_offset=seq
    )


def started(epoch: int, resume_from: int) -> events_pb2.Started:
    return events_pb2.Started(request_id=SOURCE.request_id, epoch=epoch, attempt=1, resume_from=[resume_from], seed=5)


HISTORY = (started(1, 0), chunk(0, 1, 2), started(2, 2), chunk(2, 8, 9), chunk(2, 3, epoch=2))


def test_what_a_replaced_owner_writes_is_not_shown() -> None:
    lines = shown(*HISTORY)
    assert [(line["type"], line.get("token_ids")) for line in lines] == [
        ("started", None),
        ("delta", [1, 2]),
        ("reset", None),
        ("delta", [3]),
    ]


def test_raw_shows_every_record() -> None:
    assert [line["type"] for line in shown(*HISTORY, raw=True)] == ["started", "chunk", "started", "chunk", "chunk"]


def test_one_who_comes_in_the_middle_sees_what_follows() -> None:
    lines = shown(*HISTORY[3:4], chunk(4, 10), started(2, 4), chunk(4, 10, 11, epoch=2))
    assert [(line["type"], line.get("seq"), line.get("token_ids")) for line in lines] == [
        ("delta", 2, [8, 9]),
        ("delta", 4, [10]),
        ("started", None, None),
        ("delta", 5, [11]),
    ]


def test_a_record_that_is_not_ours_is_shown_as_such() -> None:
    record = FakeRecord(b"not ours", offset=4, topic="t.chunks")
    assert list(_lines(record, "chunks", False, {})) == [{"request_id": "t.chunks-0-4", "unreadable": True}]


STRAY = FakeRecord(b"{no JSON", offset=4, topic="t.results", key=SOURCE.request_id.encode())


@pytest.mark.parametrize("kind", ["results", "chunks"])
def test_a_record_of_somebody_else_is_called_unreadable(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    for line in _lines(STRAY, kind, False, {}):
        _show(line, kind, as_json=False)
    assert capsys.readouterr().out == "t.results-0-4 unreadable\n"


class FakeReader:
    """A consumer that gives these records and then no more."""

    def __init__(self, *records: FakeRecord) -> None:
        self._records = list(records)

    async def getone(self) -> FakeRecord:
        return self._records.pop(0)


async def test_a_record_that_is_no_result_does_not_end_the_waiting_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    result = inference_pb2.Result(request_id=SOURCE.request_id, status=inference_pb2.Result.failed)
    result.error.code = "internal"
    answer = FakeRecord(wire.to_bytes(result), offset=5, topic="t.results", key=SOURCE.request_id.encode())
    failed = await _await_results(FakeReader(STRAY, answer), {SOURCE.request_id}, 10.0, as_json=False)
    assert (failed, capsys.readouterr().out) == (1, f"{SOURCE.request_id} internal: \n")
